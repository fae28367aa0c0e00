"""What a program sets before it does anything: Python's UTF-8 mode, and environment variables that torch reads."""

import contextlib
import io
import os
import sys
import tempfile


def use_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where the locale is ASCII (LC_ALL=C under Python's old rules).

    Names of files and classes could be neither printed nor written to a file, and a name that is read from a folder
    differs from the same one that a checkpoint holds.
    """
    is_script = sys.orig_argv[-len(sys.argv) :] == sys.argv
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1" and is_script:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper):  # names are bytes: print those that are no text in this locale too
        with contextlib.suppress(OSError):  # a pipe in the place of what was a file when Python started
            sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding == "utf-8" else "backslashreplace")


def name_user() -> None:
    """Give a name and a home folder to a user without entry in the password file (`docker run --user 1234`).

    torch and other packages ask for both when they are imported; without a home, `~` becomes a folder of that name.
    """
    import pwd

    uid = os.getuid()
    try:
        pwd.getpwuid(uid)
        return
    except KeyError:
        pass
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):  # as getpass.getuser does
        os.environ["USER"] = f"uid{uid}"
    if not os.environ.get("HOME"):
        home = os.path.join(tempfile.gettempdir(), f"image-zoo-{uid}")
        with contextlib.suppress(FileExistsError):
            os.mkdir(home, 0o700)
        is_own = os.lstat(home).st_uid == uid and not os.path.islink(home)  # not one that another user made
        os.environ["HOME"] = home if is_own else os.devnull


def set_torch_defaults() -> None:
    """Set defaults for this process and its children; the user's own values stay. Call before importing torch."""
    # torch imports every installed device backend, and torch_npu without CANN then breaks `import torch`.
    # common/device/device.py imports torch_npu where an npu is asked for, and says what is missing.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # OpenMP threads wait in a busy loop. Where another process needs their core, a training step on a CPU takes 2 to 10
    # times as long. Threads that sleep at once cost 6 % of a step on an idle machine. So GNU's OpenMP polls 3,000 times
    # (80 us on the machine of docs/benchmarks.md), then sleeps.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Transparent 2 MiB pages for the activations of a CPU training step: 3 to 4 % faster. Linux only.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
