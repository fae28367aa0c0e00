"""Loaders: image file to uint8 batch, decoded in dataloader workers, in the order of common/data/sampling.py.

Legend: N batch, H W pixel, C channel.
"""

import contextlib
import ctypes
import signal
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import sharedctypes

import numpy as np
import torch
from PIL import Image
from torch.utils import data

from common.data import sampling
from common.data.decode import BadImage, open_rgb
from common.data.index import FolderIndex

# A run of this many broken files in a row is a broken disk or dataset, not a broken file.
_MAX_SUBSTITUTES = 16

Transform = Callable[[Image.Image], np.ndarray]
# Pixels (None: the file does not decode), label, index, and (path, reason) of every broken file.
_Item = tuple[np.ndarray | None, int, int, list[tuple[str, str]]]


class Batch(typing.NamedTuple):
    """One batch on the host.

    Attributes:
      pixels_NHWC: uint8.
      labels_N: int64.
      indices_N: int64, positions in the FolderIndex.
      bad: (path, reason) of every file that does not decode.
      failed: whether a bad file must stop the run.
    """

    pixels_NHWC: torch.Tensor
    labels_N: torch.Tensor
    indices_N: torch.Tensor
    bad: list[tuple[str, str]]
    failed: bool

    def raise_if_failed(self) -> None:
        """Raise BadImage for the first bad file where `failed`."""
        if self.failed:
            raise BadImage(*self.bad[0])


class _EvalDataset(data.Dataset[_Item]):
    """Decodes and transforms an image.

    Attributes:
      in_progress: shared memory, one number per worker: 1 + index of the image it is decoding, or 0.
    """

    in_progress: "ctypes.Array[ctypes.c_longlong]"

    def __init__(self, index: FolderIndex, transform: Transform, on_bad_image: str) -> None:
        self.index, self.transform, self.skips = index, transform, on_bad_image == "skip"

    def _decode(self, i: int) -> np.ndarray:
        worker = data.get_worker_info()
        slot = worker.id if worker else 0
        self.in_progress[slot] = i + 1
        pixels = self.transform(open_rgb(self.index.path(i)))
        self.in_progress[slot] = 0
        return pixels

    def __getitem__(self, i: typing.Any) -> _Item:
        try:
            return self._decode(i), int(self.index.labels[i]), i, []
        except BadImage as error:
            return None, -1, i, [(error.path, error.reason)]

    def __len__(self) -> int:
        return len(self.index)


class _TrainDataset(_EvalDataset):
    """Keys are (epoch, index); the random numbers of the transform depend on the key and the seed alone."""

    def __init__(self, index: FolderIndex, transform: Transform, on_bad_image: str, seed: int) -> None:
        super().__init__(index, transform, on_bad_image)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> _Item:
        epoch, first = key
        bad = []
        for i in range(first, first + _MAX_SUBSTITUTES):
            i %= len(self.index)
            torch.manual_seed(sampling.image_seed(self.seed, epoch, i))
            pixels, label, _, broken = super().__getitem__(i)
            bad += broken
            if pixels is not None or not self.skips:
                break
        return pixels, label, i, bad


def _collate(items: list[_Item]) -> Batch:
    """Stack the items that decoded."""
    good = [(pixels, label, i) for pixels, label, i, _ in items if pixels is not None]
    return Batch(
        torch.from_numpy(np.stack([pixels for pixels, _, _ in good]) if good else np.zeros((0, 1, 1, 3), np.uint8)),
        torch.tensor([label for _, label, _ in good], dtype=torch.int64),
        torch.tensor([i for _, _, i in good], dtype=torch.int64),
        [broken for item in items for broken in item[3]],
        len(good) < len(items),
    )


# A terminal or a scheduler signals every process of a job. Workers ignore these: the trainer saves, then ends them. A
# worker that died first would be an error in the middle of a step.
_TRAINER_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals in this thread; workers that start meanwhile inherit that until they ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINER_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_excepthook(kind: type[BaseException], error: BaseException, traceback: typing.Any) -> None:
    """Silent about multiprocessing's feeder thread, which fails when the trainer no longer takes batches."""
    if not isinstance(error, (OSError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _init_worker(_worker_id: int) -> None:
    sys.excepthook = _worker_excepthook
    for number in _TRAINER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINER_SIGNALS)
    signal.set_wakeup_fd(-1)  # inherited from the trainer


class _Loader:
    """A DataLoader whose workers live as long as the loader."""

    def __init__(self, dataset: _EvalDataset, batch_sampler: Iterable, workers: int, pin_memory: bool) -> None:
        self._in_progress = dataset.in_progress = sharedctypes.RawArray("q", max(workers, 1))
        self._loader: data.DataLoader[_Item] = data.DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=_init_worker,
            persistent_workers=workers > 0,
            prefetch_factor=sampling.PREFETCH if workers else None,
        )

    def _batches(self) -> Iterator[Batch]:
        """An iterator; the first one starts the workers."""
        with _signals_blocked():
            return iter(self._loader)

    def reading(self) -> list[int]:
        """Indices of the images that are being decoded now."""
        return [i - 1 for i in self._in_progress if i]

    def close(self) -> None:
        """Kill the workers: they ignore the SIGTERM that multiprocessing sends at exit."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            with contextlib.suppress(RuntimeError):  # torch's, about a worker that died
                iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # a worker that hangs in a read would keep the process alive
                worker.join()


class TrainLoader(_Loader):
    """Micro-batches of one rank, from any step of any epoch without reading the steps before.

    Args:
      on_bad_image: "fail", or "skip" to take the next image instead.
      workers: dataloader workers of this rank.
    """

    def __init__(
        self,
        index: FolderIndex,
        transform: Transform,
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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batch sampler of the DataLoader."""
        epoch, first_step = self._start
        return sampling.epoch_batches(self.plan, self.seed, epoch, first_step, self.rank, self.world_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of `epoch` from `first_step` on."""
        self._start = (epoch, first_step)
        return self._batches()


class EvalLoader(_Loader):
    """A rank's share of a split, in order: rank r takes images r, r + world_size, ...; none is padded or dropped."""

    def __init__(
        self,
        index: FolderIndex,
        transform: Transform,
        batch_size: int,
        on_bad_image: str,
        rank: int,
        world_size: int,
        workers: int,
        pin_memory: bool,
    ) -> None:
        share = range(rank, len(index), world_size)
        batches = [list(share[i : i + batch_size]) for i in range(0, len(share), batch_size)]
        super().__init__(_EvalDataset(index, transform, on_bad_image), batches, workers, pin_memory)
        self.skips = on_bad_image == "skip"

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches():
            yield batch._replace(failed=batch.failed and not self.skips)
