"""Child processes: programs and workers that end with this process, and the limits of a machine that make them fail."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from common.errors import RunError, UserError

SHARED_MEMORY, TEMPORARY = "/dev/shm", "TMPDIR"
# Limits of a machine that make worker processes fail, and what to do about each.
_REMEDIES = {
    TEMPORARY: "set it to a short path on a local disk, such as /tmp, or give --workers 0",
    "ulimit -n": "raise it (`ulimit -n 65536`), or take fewer --workers",
    SHARED_MEMORY: (
        "enlarge it (docker run --shm-size=8g, or --ipc=host), or take fewer --workers or a smaller --batch-size"
    ),
    "ulimit -u": "raise it (in docker: --pids-limit), or take fewer --workers",
    "--workers": "take fewer, memory is short",
}
# Patterns of Python's and torch's messages; the first one found counts.
_LIMITS = {
    r"AF_UNIX|_socket\.bind|/pymp-|/listener-|temporary directory": TEMPORARY,
    r"Too many open files|ancdata": "ulimit -n",
    r"shared memory|/torch_|Bus error|No space left": SHARED_MEMORY,
    r"Resource temporarily unavailable|start new thread": "ulimit -u",
    r"Cannot allocate memory|MemoryError|can't allocate memory": "--workers",
}
_DEATHS = (ConnectionResetError, ConnectionRefusedError, EOFError)  # the worker died while it sent a result


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Make Linux send a signal to this process when its parent dies, whatever ended that. Elsewhere it does nothing.

    Args:
      parent: process id of the parent; if it is dead already, the signal is sent at once.
    """
    import ctypes

    pr_set_pdeathsig = 1
    try:
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def ending_with_this(number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """preexec_fn of subprocess, called in the main thread: the program gets a signal when this process dies."""
    return functools.partial(die_with_parent, os.getpid(), number)


def kill(processes: Iterable[BaseProcess]) -> None:
    """Kill child processes, and wait until they are gone."""
    processes = list(processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


# Leads the process group of a program, and ends all of it at the SIGTERM that it gets when this process dies.
_GROUP_LEADER = 'trap "kill -KILL 0" TERM; "$@" & wait $!'


@contextlib.contextmanager
def program(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """Start a program; all that it starts ends with it, with this block, and with this process, whatever ends that.

    Args:
      options: of subprocess.Popen. The exit status is a shell's: 128 + n where signal n ended the program.
    """
    process = subprocess.Popen(
        ["sh", "-c", _GROUP_LEADER, "sh", *command],
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=ending_with_this(signal.SIGTERM),
        **options,
    )
    # Its own children may keep its pipe open, so that the end of its output would not show its end.
    threading.Thread(target=_end_group, args=(process.pid,), daemon=True).start()
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _end_group(leader: int) -> None:
    """Wait for the leader of a process group, then end the rest of the group."""
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
        os.killpg(leader, signal.SIGKILL)


def run_program(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a `program` to its end; standard error is part of its output."""
    with program(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        output, _ = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output)


def worker_failure(error: Exception, os_limit: str = "") -> UserError | RunError:
    """The one-line error for an exception that starting worker processes, or receiving their results, raised.

    Args:
      os_limit: the limit that is the cause of an OSError whose text names none.
    Returns:
      UserError where a limit of this machine is the cause; it starts with the name of the limit. Otherwise RunError.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # An exception that a worker sent ends with the line of its own traceback that names it.
    reason = (lines[-1] if len(lines) > 1 else ": ".join([type(error).__name__, *lines])).partition(". ")[0]
    found = (limit for pattern, limit in _LIMITS.items() if re.search(pattern, f"{reason}\n{error}"))
    if limit := next(found, os_limit if isinstance(error, OSError) else ""):
        message = f"{limit}: {_state_of(limit)}worker processes cannot run ({reason}); {_REMEDIES[limit]}"
        return UserError(message, every_rank=False)
    if isinstance(error, _DEATHS) or str(error).startswith("DataLoader worker"):
        return RunError(
            f"a dataloader worker died ({reason}); where memory is short, take fewer --workers; --resume auto "
            "continues from the last saved step"
        )
    places = re.findall(r'File "(.+)", line (\d+)', str(error))
    place = f", {':'.join(places[-1])}" if places else ""
    return RunError(f"a dataloader worker failed ({reason}{place}); --workers 0 shows where")


def check_temporary_folder() -> None:
    """Open and close a socket as a worker process does to pass on a tensor.

    Raises:
      UserError: the path of the temporary folder is too long, or the folder cannot hold sockets.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="pymp-") as folder:  # names as long as those of multiprocessing
            connection.Listener(os.path.join(folder, "listener-" + 8 * "x")).close()
    except OSError as error:
        raise worker_failure(error, TEMPORARY) from error


def _state_of(limit: str) -> str:
    """What is known about a limit of `_LIMITS`, for the message."""
    if limit == TEMPORARY:
        folder = os.environ.get(TEMPORARY, "/tmp")
        return f"{folder} has {len(folder)} characters, "
    if limit == SHARED_MEMORY and os.path.isdir(SHARED_MEMORY):
        return f"{shutil.disk_usage(SHARED_MEMORY).free / 2**20:.1f} MiB free, "
    return ""
