"""Cores of this process, independent tasks on all of them, and how worker processes fail and end."""

import concurrent.futures
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from common.errors import RunError, UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

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


def usable_cores() -> int:
    """CPU cores that this process may run on: its affinity mask, which taskset, cpusets and launchers narrow."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dataloader_workers(workers: int, processes: int) -> int:
    """Dataloader workers of each of `processes` ranks: `workers` of the node, at most its cores, shared, rounded up."""
    return -(-min(workers, usable_cores()) // processes)


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


def imap_unordered(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    setup: Callable[..., object] | None = None,
    setup_args: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Yield function(task) for every task, in the order in which they finish.

    The processes ignore Ctrl-C, which this process handles, and die with it.

    Args:
      function: a module-level function.
      tasks: worth a few milliseconds each.
      workers: processes; 0: one per core. With one worker or one task, everything runs in this process.
      setup, setup_args: called once in every process before its first task.
    Raises:
      UserError: a process was killed, or none can be started. An exception of a task is raised here, after the other
        tasks were cancelled.
    """
    workers = min(workers or usable_cores(), len(tasks))
    if workers <= 1:
        if setup:
            setup(*setup_args)
        yield from map(function, tasks)
        return
    # fork starts in milliseconds; the callers have no threads at this point
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    before = set(multiprocessing.active_children())
    try:
        pool = concurrent.futures.ProcessPoolExecutor(
            workers, context, _start_process, (os.getpid(), setup, setup_args)
        )
        futures = [pool.submit(function, task) for task in tasks]
    except OSError as error:
        kill(set(multiprocessing.active_children()) - before)
        raise worker_failure(error, SHARED_MEMORY) from error
    with pool:
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--workers: one of {workers} processes was killed, perhaps for lack of memory; the files written so "
                "far are complete, start again with fewer"
            ) from error
        except Exception:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        except BaseException:  # Ctrl-C: a task that hangs in a read must not delay the end
            kill(set(multiprocessing.active_children()) - before)
            raise


def _start_process(parent: int, setup: Callable[..., object] | None, setup_args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
    if setup:
        setup(*setup_args)


def kill(processes: Iterable[BaseProcess]) -> None:
    """Kill child processes, and wait until they are gone."""
    processes = list(processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
