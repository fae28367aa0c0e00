"""Cores of this process, and independent tasks on all of them, in processes or threads."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from common import processes
from common.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def usable_cores() -> int:
    """CPU cores that this process may run on: its affinity mask, which taskset, cpusets and launchers narrow."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dataloader_workers(workers: int, processes: int) -> int:
    """Dataloader workers of each of `processes` ranks: `workers` of the node, at most its cores, shared, rounded up."""
    return -(-min(workers, usable_cores()) // processes)


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
        processes.kill(set(multiprocessing.active_children()) - before)
        raise processes.worker_failure(error, processes.SHARED_MEMORY) from error
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
            processes.kill(set(multiprocessing.active_children()) - before)
            raise


def in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], threads: int, ahead: int = 2
) -> Generator[Result, None, None]:
    """Yield function(task) for every task, in their order, computed by threads of this process.

    The first tasks start with this call. Closing the generator drops the tasks that have not started.

    Args:
      function: leaves Python's lock to other threads most of its time.
      tasks: read in the thread that iterates.
      threads: 0: that thread computes too.
      ahead: tasks per thread that are started before their result is asked for.
    Raises:
      What a task, or reading the tasks, raises.
    """
    if not threads:
        return (function(task) for task in tasks)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    remaining = iter(tasks)
    pending = collections.deque(pool.submit(function, task) for task in itertools.islice(remaining, ahead * threads))

    def results() -> Generator[Result, None, None]:
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, task) for task in itertools.islice(remaining, 1))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return results()


def _start_process(parent: int, setup: Callable[..., object] | None, setup_args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes.die_with_parent(parent)
    if setup:
        setup(*setup_args)
