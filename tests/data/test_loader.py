"""common/data/loader.py: workers that fail, die, cannot start, or are left open."""

import gc
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from multiprocessing import process, synchronize

import numpy as np
import pytest
import torch
from support import ROOT, TESTS, run_program
from tiny import RECIPE, SPEC

from common import parallel, processes
from common.data import augment, batch, index, loader, sampling, transforms
from common.errors import RunError, UserError


@pytest.fixture
def batches(images):
    """Makes EvalLoaders of the 21 validation images in batches of 7; closed with the test."""
    val = index.load_splits(str(images)).val
    made = []

    def make(transform=None):
        made.append(loader.EvalLoader(val, transform or transforms.eval_transform(SPEC, 32), 7, "fail", 0, 1, 2, False))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert multiprocessing.active_children() == [], "a worker was left behind"


def test_repeats_of_an_image_are_augmented_differently_and_alike_in_every_loader(images):
    train, plan = index.load_splits(str(images)).train, sampling.StepPlan(60, 1, 6, repeats=3)
    transform = augment.TrainTransform(RECIPE)
    read = [next(loader.TrainLoader(train, transform, plan, 0, "fail", 0, 1, 0, False).epoch(0)) for _ in range(2)]
    pixels, ids = read[0].pixels_NHWC, read[0].indices_N.tolist()
    assert ids == [ids[0]] * 3 + [ids[3]] * 3 and torch.equal(pixels, read[1].pixels_NHWC)
    assert len({pixels[i].numpy().tobytes() for i in range(6)}) == 6
    plain = sampling.StepPlan(60, 1, 60)
    all_once = next(loader.TrainLoader(train, transform, plain, 0, "fail", 0, 1, 0, False).epoch(0))
    assert torch.equal(all_once.pixels_NHWC[all_once.indices_N == ids[0]][0], pixels[0])  # as without repeats


def fail(image):
    raise ValueError("no such\ncrop")


def test_a_temporary_folder_with_a_long_path_is_named(batches, monkeypatch):
    """multiprocessing prints the error of a socket in a thread of the worker, drops the batch, and waits for it."""
    monkeypatch.setitem(process.current_process()._config, "tempdir", "/tmp/" + 90 * "x")
    monkeypatch.setenv("TMPDIR", "/tmp/" + 71 * "x")
    with pytest.raises(
        UserError, match=r"^TMPDIR: /tmp/x+ has 76 characters, .*AF_UNIX path too long\); set it to a short"
    ):
        list(batches())


@pytest.mark.parametrize(("length", "fits"), [(75, True), (76, False)])
def test_the_longest_temporary_folder_that_holds_a_socket(tmp_path, monkeypatch, length, fits):
    """A socket's path has at most 107 bytes, of which pymp-xxxxxxxx/listener-xxxxxxxx and slashes take 32."""
    folder = tmp_path.parents[1] / "x"
    folder = folder.with_name("x" * (length - len(str(folder.parent)) - 1))
    folder.mkdir(exist_ok=True)
    assert len(str(folder)) == length
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    if fits:
        processes.check_temporary_folder()
    else:
        with pytest.raises(UserError, match="TMPDIR: "):
            processes.check_temporary_folder()


def test_shared_memory_that_is_too_small_is_named(batches, monkeypatch):
    def share(*args, **kwargs):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", share)
    with pytest.raises(UserError, match=r"^/dev/shm: .* MiB free, .*unable to allocate shared memory.*--shm-size"):
        list(batches())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FileNotFoundError(2, "No such file")])
def test_no_shared_memory_for_a_lock_is_named(batches, monkeypatch, error):
    def lock(*args, **kwargs):
        raise error

    monkeypatch.setattr(synchronize.SemLock, "__init__", lock)
    with pytest.raises(UserError, match="^/dev/shm: .*--shm-size"):
        list(batches())
    with pytest.raises(UserError, match="^/dev/shm: .*--shm-size"):
        list(parallel.imap_unordered(abs, [1, 2, 3], 2))


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "/dev/shm"), OSError(30, "Read-only", "/dev/shm/x")]
)
def test_no_shared_memory_is_named_by_a_loader_with_workers_and_not_needed_by_one_without(images, monkeypatch, error):
    def array(*args):
        raise error

    monkeypatch.setattr(loader.sharedctypes, "RawArray", array)
    val = index.load_splits(str(images)).val

    def make(workers):
        return loader.EvalLoader(val, transforms.eval_transform(SPEC, 32), 7, "fail", 0, 1, workers, False)

    with pytest.raises(UserError, match="^/dev/shm: .*--shm-size"):
        make(2)
    assert sum(len(batch[1]) for batch in make(0)) == len(val)


def test_a_process_that_cannot_start_is_named_and_the_others_end(batches, monkeypatch):
    fork, forks = os.fork, []

    def second_fails():
        forks.append(None)
        if len(forks) % 2 == 0:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(UserError, match="^ulimit -u: .*--pids-limit"):
        list(batches())
    gc.collect()
    assert multiprocessing.active_children() == [] and unraisable == []
    with pytest.raises(UserError, match="^ulimit -u: .*--pids-limit"):
        list(parallel.imap_unordered(abs, [1, 2, 3], 2))
    assert multiprocessing.active_children() == []


def test_an_unknown_error_of_a_worker_is_one_line_with_its_place(batches):
    with pytest.raises(RunError) as raised:
        list(batches(transform=fail))
    line = fail.__code__.co_firstlineno + 1
    assert f"{raised.value}" == f"a dataloader worker failed (crop, {__file__}:{line}); --workers 0 shows where"


@pytest.mark.parametrize(
    ("error", "kind", "begin"),
    [
        (RuntimeError("received 0 items of ancdata"), UserError, "ulimit -n: "),
        (OSError(24, "Too many open files"), UserError, "ulimit -n: "),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is"), UserError, "/dev/shm: "),
        (RuntimeError("can't start new thread"), UserError, "ulimit -u: "),
        (OSError(12, "Cannot allocate memory"), UserError, "--workers: "),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), UserError, "TMPDIR: "),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), RunError, "a dataloader worker died"),
        (ConnectionResetError(104, "reset"), RunError, "a dataloader worker died"),
        (EOFError(), RunError, "a dataloader worker died (EOFError)"),
    ],
)
def test_the_limit_behind_an_error_is_named_with_a_remedy(error, kind, begin):
    found = processes.worker_failure(error)
    assert type(found) is kind and str(found).startswith(begin), found
    assert "\n" not in str(found) and re.search("take fewer|set it", str(found))


def test_the_death_of_a_worker_is_raised_by_the_next_batch_only(batches):
    images = batches()
    first = iter(images)
    next(first)
    victim = images._workers()[0]
    os.kill(victim.pid, signal.SIGKILL)
    while not os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        time.sleep(0.001)
    sum(range(1000))  # SIGCHLD has been handled here
    with pytest.raises(RunError, match="a dataloader worker died .*is killed by signal: Killed"):
        list(first)


def test_a_program_that_leaves_its_loaders_open_ends(images, tmp_path):
    """Workers ignore the SIGTERM that multiprocessing sends before it waits for them."""
    (tmp_path / "open.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]\n"
        "from tiny import SPEC\nfrom common.data import index, loader, transforms\n"
        f"val = index.load_splits({str(images)!r}).val\n"
        "transform = transforms.eval_transform(SPEC, 32)\n"
        "kept = [loader.EvalLoader(val, transform, 7, 'fail', 0, 1, 2, False) for _ in 'ab']\n"
        "print(len(list(kept[0])), len(next(iter(kept[1])).labels_N))\n"
    )
    done = run_program(sys.executable, tmp_path / "open.py", timeout=60)
    assert (done.stdout, done.stderr) == ("3 7\n", "")


@pytest.mark.parametrize(("threads", "on_bad_image"), [(0, "skip"), (2, "skip"), (2, "fail")])
def test_threads_give_the_batches_of_worker_processes(images, tmp_path, threads, on_bad_image):
    shutil.copytree(images / "val", tmp_path / "val")
    broken = sorted((tmp_path / "val").rglob("*.*"))[9]
    broken.write_bytes(broken.read_bytes()[:50])
    val, transform = index.load_folder(tmp_path / "val"), transforms.eval_transform(SPEC, 32)
    sizes = [7, 7, 4, 2, 1]
    by_threads = batch.ThreadLoader(val, transform, sizes, on_bad_image, threads)
    by_worker = loader.EvalLoader(val, transform, sizes, on_bad_image, 0, 1, 0, False)
    compared = 0
    for found, expected in zip(by_threads, by_worker, strict=True):
        for name in ("pixels_NHWC", "labels_N", "indices_N"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
            assert isinstance(getattr(found, name), np.ndarray)
        assert found[3:] == expected[3:]
        compared += len(found.labels_N)
    assert compared == len(val) - 1
    by_threads.close()
