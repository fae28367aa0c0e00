"""common/parallel.py: the cores of this process and how they are shared."""

import os
import threading
import time

import pytest

from common import parallel


@pytest.fixture
def six_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))


def test_cores_are_those_of_the_affinity_mask(six_cores, monkeypatch):
    assert parallel.usable_cores() == 6
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert parallel.usable_cores() == os.cpu_count()


@pytest.mark.parametrize(
    ("workers", "processes", "expected"), [(8, 1, 6), (4, 1, 4), (8, 4, 2), (5, 2, 3), (1, 8, 1), (0, 2, 0)]
)
def test_workers_of_a_node_are_capped_at_its_cores_and_shared(six_cores, workers, processes, expected):
    assert parallel.dataloader_workers(workers, processes) == expected


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_is_done_once(workers):
    assert sorted(parallel.imap_unordered(abs, range(-20, 0), workers)) == list(range(1, 21))


def test_an_exception_of_a_task_is_raised_here():
    with pytest.raises(ValueError, match="invalid literal"):
        list(parallel.imap_unordered(int, ["1", "x", "3"], 2))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_of_threads_come_in_the_order_of_their_tasks(threads):
    def slower_first(task):
        time.sleep(0.01 * (6 - task))
        return task

    assert list(parallel.in_order(slower_first, range(6), threads)) == list(range(6))


def test_threads_start_with_the_call_and_no_more_tasks_than_asked_for():
    read, started = [], threading.Event()
    tasks = (read.append(i) or i for i in range(100))
    results = parallel.in_order(lambda task: started.set() or task, tasks, 2, ahead=3)
    assert started.wait(10) and len(read) == 6
    assert next(results) == 0 and len(read) == 7
    results.close()
    assert next(results, None) is None


@pytest.mark.parametrize("threads", [0, 2])
def test_an_exception_of_a_thread_is_raised_in_its_place(threads):
    results = parallel.in_order(int, ["1", "x", "3"], threads)
    assert next(results) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        next(results)
