"""Loaders: image file to uint8 batch, decoded in dataloader workers, in the order of common/data/sampling.py.

Legend: N batch, H W pixel, C channel.
"""

import atexit
import contextlib
import ctypes
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import queues, sharedctypes

import numpy as np
import torch
from torch._utils import ExceptionWrapper
from torch.utils import data
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from common import processes
from common.data import sampling
from common.data.batch import Batch, Transform, fill
from common.data.decode import open_rgb
from common.data.index import FolderIndex

# A run of this many broken files in a row is a broken disk or dataset, not a broken file.
_MAX_SUBSTITUTES = 16


class FileTransform(typing.Protocol):
    """Content of a file (None: not read yet) to uint8 [H, W, C], which is written to `out_HWC` where that is given."""

    def __call__(self, path: str, content: bytes | None, out_HWC: torch.Tensor | None) -> np.ndarray: ...


class _EvalDataset(data.Dataset[Batch]):
    """Decodes and transforms the images of a batch.

    Attributes:
      in_progress: one number per worker, in shared memory: 1 + index of the image it is decoding, or 0.
    """

    in_progress: "ctypes.Array[ctypes.c_longlong] | list[int]"

    def __init__(self, index: FolderIndex, transform: FileTransform, on_bad_image: str) -> None:
        self.index, self.transform, self.skips = index, transform, on_bad_image == "skip"

    def _candidates(self, key: typing.Any) -> Iterable[int]:
        """Indices of the image of a key and of those that may replace it."""
        return [key]

    def __getitems__(self, keys: Sequence[typing.Any]) -> Batch:
        """The images of `keys` that decode; torch's fetcher calls it with all keys of a batch."""
        worker = data.get_worker_info()
        slot = worker.id if worker else 0

        def read(i: int, out_HWC: torch.Tensor | None) -> np.ndarray:
            self.in_progress[slot] = i + 1
            try:
                return self.transform(self.index.path(i), self.index.read(i), out_HWC)
            finally:
                self.in_progress[slot] = 0

        def empty(shape: tuple[int, ...]) -> torch.Tensor:
            return _empty_uint8(shape, is_shared=worker is not None and shape[0] > 0)

        def as_tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64)

        return fill(keys, self._candidates, read, lambda i: int(self.index.labels[i]), empty, as_tensor)

    def __len__(self) -> int:
        return len(self.index)


class _TrainDataset(_EvalDataset):
    """Keys are (epoch, index, repeat); the random numbers of the transform depend on the key and the seed alone."""

    def __init__(self, index: FolderIndex, transform: FileTransform, on_bad_image: str, seed: int) -> None:
        super().__init__(index, transform, on_bad_image)
        self.seed = seed

    def _candidates(self, key: tuple[int, int, int]) -> Iterator[int]:
        epoch, first, repeat = key
        for i in range(first, first + (_MAX_SUBSTITUTES if self.skips else 1)):
            i %= len(self.index)
            # torch.manual_seed would also seed the generators of accelerators, which takes longer than a crop.
            torch.default_generator.manual_seed(sampling.image_seed(self.seed, epoch, i, repeat))
            yield i


def _empty_uint8(shape: tuple[int, ...], is_shared: bool) -> torch.Tensor:
    """A tensor that a worker fills and sends without a copy, as torch's own collate function makes it."""
    if not is_shared:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]


def _of_file(transform: Transform) -> FileTransform:
    """A transform of decoded images as one of files."""

    def read(path: str, content: bytes | None, out_HWC: torch.Tensor | None) -> np.ndarray:
        pixels = transform(open_rgb(path, content))
        if out_HWC is not None:
            out_HWC.numpy()[...] = pixels
        return pixels

    return read


# A terminal or a scheduler signals every process of a job. Workers ignore these: the trainer saves, then ends them. A
# worker that died first would be an error in the middle of a step.
_TRAINER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals in this thread; workers that start meanwhile inherit that until they ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINER_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_excepthook(kind: type[BaseException], error: BaseException, traceback: typing.Any) -> None:
    """Silent about multiprocessing's own threads, which fail when the trainer no longer takes batches."""
    if not isinstance(error, (OSError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _init_worker(_worker_id: int) -> None:
    sys.excepthook = _worker_excepthook
    for number in _TRAINER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINER_SIGNALS)
    signal.set_wakeup_fd(-1)  # inherited from the trainer
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    processes.die_with_parent(parent.pid)
    queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _send_error(queue: "queues.Queue[typing.Any]", _error: Exception, item: typing.Any) -> None:
    """Send an error in place of a batch that cannot be sent; multiprocessing would print it and drop the batch."""
    if not isinstance(item, tuple) or isinstance(item[1], ExceptionWrapper):  # the pipe does not even take an error
        os._exit(1)
    queue.put((item[0], ExceptionWrapper(where="while a dataloader worker sent a batch")))


class _DeathWatch:
    """Raises torch's RuntimeError about a dead worker in this process, but only while it waits for a batch.

    torch's own SIGCHLD handler raises it wherever the main thread is: in a collective, or in a __del__.
    """

    def __init__(self) -> None:
        self._is_waiting = False

    def install(self) -> None:
        """Take the place of torch's handler, which the start of the first workers installs."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._on_child_exit)

    def _on_child_exit(self, *_: object) -> None:
        if self._is_waiting:
            signal_handling._error_if_any_worker_fails()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self._is_waiting = True
        try:
            signal_handling._error_if_any_worker_fails()
            yield
        finally:
            self._is_waiting = False


_death_watch = _DeathWatch()


def _unchanged(batch: typing.Any) -> typing.Any:
    return batch


class _Loader:
    """A DataLoader whose workers live as long as the loader, or this process.

    Attributes:
      waiting: makes the context in which this process waits for a batch; it may raise there to end the wait.
    """

    waiting: Callable[[], contextlib.AbstractContextManager[object]]

    def __init__(self, dataset: _EvalDataset, batch_sampler: Iterable, workers: int, pin_memory: bool) -> None:
        self.waiting = contextlib.nullcontext
        try:  # without workers, nothing is shared, and a machine without /dev/shm can read images too
            dataset.in_progress = sharedctypes.RawArray("q", workers) if workers else [0]
        except OSError as error:
            raise processes.worker_failure(error, processes.SHARED_MEMORY) from error
        self._in_progress = dataset.in_progress
        self._loader: data.DataLoader[Batch] = data.DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=_unchanged,  # __getitems__ makes the batch
            pin_memory=pin_memory,
            worker_init_fn=_init_worker,
            persistent_workers=workers > 0,
            prefetch_factor=sampling.PREFETCH if workers else None,
        )
        self._kill_at_exit: Callable[[], None] | None = None

    def _batches(self) -> Iterator[Batch]:
        """The batches; the first one starts the workers.

        Raises:
          UserError: a limit of the machine stops the workers. RunError: a worker died or failed.
        """
        iterator = self._iterator()
        while True:
            try:
                with self.waiting(), _death_watch.waiting():
                    batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                raise processes.worker_failure(error) from error
            yield batch

    def _iterator(self) -> Iterator[Batch]:
        if self._workers():  # they acknowledge the new epoch
            try:
                with self.waiting(), _death_watch.waiting():
                    return iter(self._loader)
            except RuntimeError as error:
                raise processes.worker_failure(error) from error
        before = set(multiprocessing.active_children())
        try:
            with _signals_blocked():
                iterator = iter(self._loader)
                _death_watch.install()
        except (OSError, RuntimeError) as error:
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if isinstance(half_made := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
                    half_made._shutdown = True  # its __del__ would fail
            processes.kill(set(multiprocessing.active_children()) - before)
            raise processes.worker_failure(error, processes.SHARED_MEMORY) from error
        if workers := self._workers():
            # Before multiprocessing's own function, which waits for workers: they ignore the SIGTERM that it sends.
            self._kill_at_exit = functools.partial(processes.kill, workers)
            atexit.register(self._kill_at_exit)
        return iterator

    def _workers(self) -> list[typing.Any]:
        return getattr(getattr(self._loader, "_iterator", None), "_workers", [])

    def reading(self) -> list[int]:
        """Indices of the images that are being decoded now."""
        return [i - 1 for i in self._in_progress if i]

    def close(self) -> None:
        """Kill the workers."""
        if self._kill_at_exit is None:
            return
        iterator: typing.Any = self._loader._iterator
        if iterator._worker_pids_set:  # else torch would report the deaths
            signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        if iterator._pin_memory:  # the thread must not wait for the rest of a batch whose worker was killed
            iterator._pin_memory_thread_done_event.set()
            iterator._worker_result_queue.put((None, None))
            iterator._pin_memory_thread.join()
        self._kill_at_exit()
        iterator._shutdown_workers()
        atexit.unregister(self._kill_at_exit)
        self._kill_at_exit = None


class TrainLoader(_Loader):
    """Micro-batches of one rank, from any step of any epoch without reading the steps before.

    Args:
      on_bad_image: "fail", or "skip" to take the next image instead.
      workers: dataloader workers of this rank.
    """

    def __init__(
        self,
        index: FolderIndex,
        transform: FileTransform,
        plan: sampling.StepPlan,
        seed: int,
        on_bad_image: str,
        rank: int,
        world_size: int,
        workers: int,
        pin_memory: bool,
    ) -> None:
        self.plan, self.seed, self.rank, self.world_size = plan, seed, rank, world_size
        self._start = (0, 0)
        super().__init__(_TrainDataset(index, transform, on_bad_image, seed), self, workers, pin_memory)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Batch sampler of the DataLoader."""
        epoch, first_step = self._start
        return sampling.epoch_batches(self.plan, self.seed, epoch, first_step, self.rank, self.world_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of `epoch` from `first_step` on."""
        self._start = (epoch, first_step)
        return self._batches()


class EvalLoader(_Loader):
    """A rank's share of a split, in order: rank r takes images r, r + world_size, ...; none is padded or dropped.

    Args:
      batch_size: images of a batch, or of each batch of this rank.
    """

    def __init__(
        self,
        index: FolderIndex,
        transform: Transform,
        batch_size: int | Sequence[int],
        on_bad_image: str,
        rank: int,
        world_size: int,
        workers: int,
        pin_memory: bool,
    ) -> None:
        share = range(rank, len(index), world_size)
        if isinstance(batch_size, int):
            batch_size = [batch_size] * -(-len(share) // batch_size)
        ends = list(itertools.accumulate(batch_size))
        batches = [list(share[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        super().__init__(_EvalDataset(index, _of_file(transform), on_bad_image), batches, workers, pin_memory)
        self.skips = on_bad_image == "skip"

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches():
            yield batch._replace(failed=batch.failed and not self.skips)
