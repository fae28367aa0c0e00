"""Independent tasks on all cores."""

import concurrent.futures
import multiprocessing
import os

from common.errors import UserError


def num_workers(wanted, num_tasks):
    """Processes to start: `wanted`, or one per core this process may use where that is 0; never more than tasks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(wanted or cores, num_tasks)


def unordered(function, tasks, workers, setup=None, setup_args=()):
    """Yield function(task) for every task, as they finish; with one worker in this very process.

    Args:
      function: a module-level function.
      tasks: list; make each one worth a few milliseconds.
      workers: --workers of the program, 0 is one per core.
      setup, setup_args: called once in every process before its first task.
    Raises:
      UserError: a process was killed. What a task raises is raised here, after the rest was cancelled.
    """
    workers = num_workers(workers, len(tasks))
    if workers <= 1:
        if setup:
            setup(*setup_args)
        yield from map(function, tasks)
        return
    # fork starts in milliseconds; these programs have no threads when they come here
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    with concurrent.futures.ProcessPoolExecutor(workers, context, setup, setup_args) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(function, task) for task in tasks]):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"--workers: one of {workers} processes was killed, perhaps for want of memory; what is "
                "written so far is whole, start again with fewer"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
