"""common/parallel.py: the cores of this process and how they are shared."""

import os

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
