"""Exit statuses of the programs, and the exceptions that end one with a single line instead of a traceback."""

import contextlib
import hashlib
import os
import pathlib
import re
import sys
import traceback

EXIT_USER_ERROR = 2
EXIT_TERMINATED = 143  # 128 + SIGTERM: the checkpoint of this very step was saved
# Of one of several ranks, for its launcher (the numbers are those of sysexits.h):
EXIT_RESTART = 75  # as 143, and the launcher starts the ranks again
EXIT_FINAL = 70  # a failure that would repeat itself, so the launcher does not start the ranks again; it ends with 1
EXIT_PEER_LOST = 69  # another rank ended; the launcher says which


# Environment variable with a folder of the launcher, in which its ranks note the exceptions that they have printed.
REPORTS = "ZOO_REPORTS"


class UserError(ValueError):
    """A mistake in a flag, a file or a folder: one line `error: ...` and exit status 2.

    The message begins with the flag or file, then says what was found, then what is allowed or what to do.

    Attributes:
      every_rank: whether all ranks of a run raise it (a wrong flag), so that rank 0 alone prints it; otherwise the rank
        that raises it prints it (an image that does not decode).
    """

    def __init__(self, message: str, every_rank: bool = True) -> None:
        super().__init__(message)
        self.every_rank = every_rank


class NothingToDo(Exception):
    """What was asked for is done already: one line on standard output, exit status 0."""


class Interrupted(BaseException):
    """A signal asks this process to stop while it waits for images: raised to end the wait."""


class RunError(RuntimeError):
    """A failure of a run whose input is right (a loss that is not finite): one line, exit status 1.

    Attributes:
      is_final: whether ranks that start again from the last checkpoint would fail in the same way.
    """

    def __init__(self, message: str, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


class PeerLost(RunError):
    """Another rank ended: what all ranks but that one see. Its own message or its launcher's gives the reason."""


def print_error(line: str) -> None:
    """Print a line to standard error; nothing where that is closed or on a full disk."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def missing_package(error: ModuleNotFoundError) -> str:
    """The message where a package of others is not installed; empty for a module of this repository."""
    package = (error.name or "").partition(".")[0]
    if (pathlib.Path(__file__).resolve().parents[1] / package).exists():
        return ""
    return (
        f"{sys.executable}: the Python package {package} is not installed; run `make venv`, or `pip install -r "
        "requirements.txt` in your own environment"
    )


def print_once(error: BaseException, line: str = "") -> None:
    """Print an exception as the interpreter does, or `line`; once for the ranks of a node and their restarts.

    Exceptions are the same where type and line of code are.
    """
    if _is_reported(error):
        return
    if line:
        print_error(line)
        return
    with contextlib.suppress(OSError):
        traceback.print_exception(error)


def _is_reported(error: BaseException) -> bool:
    """Whether another rank of this node has printed the same exception, or will.

    The ranks of our launcher note what they print. Those of another one share their packages, and local rank 0 prints
    what is wrong with these.
    """
    if REPORTS not in os.environ:
        return isinstance(error, ImportError) and os.environ.get("LOCAL_RANK", "0") != "0"
    last = traceback.extract_tb(error.__traceback__)[-1]
    name = hashlib.sha256(f"{type(error).__name__} {last.filename}:{last.lineno}".encode()).hexdigest()
    try:
        os.close(os.open(os.path.join(os.environ[REPORTS], name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return True
    except OSError:
        pass
    return False


def discard_output() -> None:
    """Drop what is still to be printed to standard output, which is closed or on a full disk."""
    with contextlib.suppress(OSError):  # it may have no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def printable(text: str) -> str:
    """Text from a file or library as it can be shown on a terminal: no escape sequences."""
    return "".join(c if c.isprintable() else "?" for c in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text))
