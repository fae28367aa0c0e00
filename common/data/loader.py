"""Loaders: file -> uint8 batch, decoded in worker processes, in the order that common/data/order.py defines.

Legend: N batch, H W pixel, C channel.
"""

import contextlib
import signal
import sys
import typing
from multiprocessing import sharedctypes

import numpy as np
import torch
from torch.utils import data

from common.data import sampling
from common.data.decode import BadImage, open_rgb

# A run of this many broken files in a row is a broken disk or dataset, not a broken file.
_MAX_SUBSTITUTES = 16


class Batch(typing.NamedTuple):
    """One batch on the host.

    Attributes:
      pixels_NHWC: uint8.
      labels_N: int64.
      indices_N: int64, positions in the FolderIndex.
      bad: (path, reason) of every file that did not decode.
      failed: whether a bad file must stop the run.
    """

    pixels_NHWC: torch.Tensor
    labels_N: torch.Tensor
    indices_N: torch.Tensor
    bad: list
    failed: bool

    def raise_if_failed(self):
        """Raise BadImage for the first broken file of a batch that must not have one."""
        if self.failed:
            raise BadImage(*self.bad[0])


class _Images(data.Dataset):
    """Decodes and transforms; an item is (pixels or None, label, index, [(path, reason) of broken files])."""

    def __init__(self, index, transform, on_bad_image):
        self.index, self.transform, self.skip = index, transform, on_bad_image == "skip"
        self.reading = None  # shared memory: 1 + index of the image that each loader process decodes; 0: none

    def _decode(self, i):
        worker = data.get_worker_info()
        slot = worker.id if worker else 0
        self.reading[slot] = i + 1
        pixels = self.transform(open_rgb(self.index.path(i)))
        self.reading[slot] = 0
        return pixels

    def __getitem__(self, i):
        try:
            return self._decode(i), int(self.index.labels[i]), i, []
        except BadImage as error:
            return None, -1, i, [(error.path, error.reason)]

    def __len__(self):
        return len(self.index)


class _TrainImages(_Images):
    """Items are asked for as (epoch, index); the random numbers of the transform depend on just that and the seed."""

    def __init__(self, index, transform, on_bad_image, seed):
        super().__init__(index, transform, on_bad_image)
        self.seed = seed

    def __getitem__(self, key):
        epoch, first = key
        bad = []
        for i in range(first, first + _MAX_SUBSTITUTES):
            i %= len(self.index)
            torch.manual_seed(sampling.image_seed(self.seed, epoch, i))
            pixels, label, _, broken = super().__getitem__(i)
            bad += broken
            if pixels is not None or not self.skip:
                break
        return pixels, label, i, bad


def _collate(items):
    """Stack the items that decoded."""
    good = [item for item in items if item[0] is not None]
    bad = [broken for item in items for broken in item[3]]
    pixels = np.stack([item[0] for item in good]) if good else np.zeros((0, 1, 1, 3), np.uint8)
    return Batch(
        torch.from_numpy(pixels),
        torch.tensor([item[1] for item in good], dtype=torch.int64),
        torch.tensor([item[2] for item in good], dtype=torch.int64),
        bad,
        len(good) < len(items),
    )


# A terminal or a scheduler signals every process of a job. The trainer saves first and then ends its workers; one that
# died before it would be an error in the middle of a step.
_TO_THE_TRAINER = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _signals_held_back():
    """Workers that start in here get no signal before they ignore it; the trainer hears it in its listening thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _print_unless_trainer_left(kind, error, traceback):
    """sys.excepthook of a worker, where multiprocessing's thread reports a batch that the trainer no longer fetches."""
    if not isinstance(error, (OSError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _quiet_worker(_worker_id):
    sys.excepthook = _print_unless_trainer_left
    for number in _TO_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_THE_TRAINER)
    signal.set_wakeup_fd(-1)  # the trainer's


class _Loader:
    """What both loaders share: a DataLoader with workers that live as long as the loader, and their orderly end."""

    def __init__(self, dataset, batch_sampler, workers, pin_memory):
        self._reading = dataset.reading = sharedctypes.RawArray("q", max(workers, 1))
        self._loader = data.DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=_quiet_worker,
            persistent_workers=workers > 0,
            prefetch_factor=sampling.PREFETCH if workers else None,
        )

    def _batches(self):
        """An iterator; the first one starts the workers."""
        with _signals_held_back():
            return iter(self._loader)

    def reading(self):
        """Indices of the images that are being decoded at this moment."""
        return [i - 1 for i in self._reading if i]

    def close(self):
        """End the workers now: they ignore the SIGTERM with which multiprocessing would end them at exit."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            with contextlib.suppress(RuntimeError):  # torch's, about a worker that died
                iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # one that hangs in a read would keep the process for ever
                worker.join()


class TrainLoader(_Loader):
    """Micro-batches of one rank, from any step of any epoch at once."""

    def __init__(self, index, transform, plan, config, rank, world_size, workers, pin_memory):
        self.plan, self.seed, self.rank, self.world_size = plan, config.seed, rank, world_size
        self._start = (0, 0)
        dataset = _TrainImages(index, transform, config.on_bad_image, config.seed)
        super().__init__(dataset, self, workers, pin_memory)

    def __iter__(self):  # the batch sampler of the DataLoader
        epoch, first_step = self._start
        return sampling.epoch_batches(self.plan, self.seed, epoch, first_step, self.rank, self.world_size)

    def epoch(self, epoch, first_step=0):
        """Iterate over the Batches of `epoch`, beginning with those of `first_step`."""
        self._start = (epoch, first_step)
        return self._batches()


class EvalLoader(_Loader):
    """A rank's share of a split, in order: rank r takes images r, r + world_size, ...; none is padded or dropped."""

    def __init__(self, index, transform, batch_size, on_bad_image, rank, world_size, workers, pin_memory):
        share = range(rank, len(index), world_size)
        batches = [list(share[i : i + batch_size]) for i in range(0, len(share), batch_size)]
        super().__init__(_Images(index, transform, on_bad_image), batches, workers, pin_memory)
        self.skip = on_bad_image == "skip"

    def __iter__(self):
        for batch in self._batches():
            yield batch._replace(failed=batch.failed and not self.skip)
