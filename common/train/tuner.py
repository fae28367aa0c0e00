"""Values that are found before the first step: --batch-size auto and --lr-find.

Both train copies of the network that are thrown away, so a run that found its values has the same bits as one that was
given them.
"""

import dataclasses
import gc
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch

from common.data import sampling
from common.data.batch import Batch
from common.device import device as devices
from common.device.memory import MemoryMeter
from common.distributed import Group, World
from common.errors import UserError
from common.train.run_log import RunLogger
from common.train.run_setup import SMALLEST_MICRO_BATCH, RunSetup
from common.train.step import TrainStep
from common.train.trainer import Trainer

# An epoch has at least so many steps: a training set of some hundred images would fit as one.
_STEPS_OF_EPOCH = 10
# Micro-batches to measure: from the smallest, doubled until they differ by this many bytes, to the largest, or to one
# that might not fit. The first images of a batch take more than the others: 46 MiB each from 4 to 8 images, 33 MiB from
# 4 to 64, for a network of separable convolutions at 96 pixels.
_SMALLEST_MEASURED, _LARGEST_MEASURED, _MEASURABLE = 4, 256, 2**30

# Range test: learning rates of a geometric series, and the rise of the smoothed loss over its minimum that ends it.
_LOWEST, _HIGHEST, _NUM_RATES, _RISE = 1e-5, 10.0, 100, 4.0
_MEMORY = 0.9  # decay of the smoothed loss


def micro_batch_size(setup: RunSetup, group: Group) -> tuple[int, str]:
    """Images of the largest micro-batch that fits on every rank's device, and one line that says so.

    Memory is linear in the images: it is measured at a small and a larger size. On accelerators a step proves the
    result. It is a multiple of 8, and leaves at least ten steps to an epoch.
    """
    device, plan = group.device, setup.plan
    trial = _Trial(setup, group)
    fits = _fitting(trial.peak, trial.memory.budget)
    limit = max(SMALLEST_MICRO_BATCH, plan.num_images // (_STEPS_OF_EPOCH * plan.num_micro_batches))
    images = _rounded(min(fits, limit))
    while device.kind != "cpu":
        try:
            trial.peak(images)
            break
        except Exception as error:
            if images == SMALLEST_MICRO_BATCH or not devices.exhausted_memory(error):
                raise
        fits = images = _rounded(images * 7 // 8)
    budget = f"{trial.memory.budget / 2**30:.1f} GiB of {device.describe()}"
    trial.close()
    images, fits = (-group.all_reduce_max(-number) for number in (images, fits))
    limited = f"; an epoch has at least {_STEPS_OF_EPOCH} steps" if images < _rounded(fits) else ""
    return images, f"--batch-size auto: {images} images per device and micro-batch; {fits} fit in {budget}{limited}"


class _Trial:
    """Steps of one rank by itself on images of random numbers, and the memory that they take.

    Attributes:
      memory: MemoryMeter; its budget was read before the network was built.
    """

    def __init__(self, setup: RunSetup, group: Group) -> None:
        self._device, self._size = group.device, setup.config.image_size
        self._num_classes = setup.build_options["num_classes"]
        self.memory = MemoryMeter(group.device, group.world.local_size)
        plan = sampling.StepPlan(setup.plan.num_images, 1, SMALLEST_MICRO_BATCH)
        setup = dataclasses.replace(setup, plan=plan, config=dataclasses.replace(setup.config, compile=False))
        self._step = TrainStep(setup, Group(World(local_size=group.world.local_size), group.device))
        self._step.train()

    def peak(self, images: int) -> int:
        """Bytes that the process holds at most in a step of so many images."""
        self.memory.start()
        pixels = torch.randint(256, (images, self._size, self._size, 3), dtype=torch.uint8)
        labels = torch.arange(images) % self._num_classes
        self._step(0, 0, [Batch(pixels, labels, labels, [], False)])
        self._device.synchronize()
        return self.memory.peak()

    def close(self) -> None:
        del self._step
        gc.collect()
        self.memory.release()


def _fitting(peak: Callable[[int], int], budget: float) -> int:
    """How many images fit in `budget` bytes, where peak(images) are the bytes that they take."""
    first, images = peak(_SMALLEST_MEASURED), 2 * _SMALLEST_MEASURED
    while (more := peak(images) - first) < _MEASURABLE and images < _LARGEST_MEASURED and first + 3 * more < budget:
        images *= 2
    per_image = max(more, 1) / (images - _SMALLEST_MEASURED)
    fits = _SMALLEST_MEASURED + (budget - first) / per_image
    return max(SMALLEST_MICRO_BATCH, int(min(fits, 2**20)))


def _rounded(images: int) -> int:
    return images - images % 8 if images >= 8 else images


def learning_rate(setup: RunSetup, group: Group, logger: RunLogger) -> float:
    """A tenth of the learning rate at which the smoothed loss is lowest while the rate rises step by step.

    The range test of https://arxiv.org/abs/1506.01186, section 3.3, in the form of fastai: one geometric rise over 100
    steps on training images, which ends where the loss explodes. Its curve goes to metrics.jsonl.

    Raises:
      UserError: no rate makes the loss fall.
    """
    rates = np.geomspace(_LOWEST, _HIGHEST, _NUM_RATES).tolist()
    steps_per_epoch = setup.plan.steps_per_epoch
    config = dataclasses.replace(setup.config, compile=False, ema=0.0)
    trial = dataclasses.replace(setup, config=config, lr_at=lambda epoch, step: rates[epoch * steps_per_epoch + step])
    logger.info(f"--lr-find: up to {_NUM_RATES} steps with rising learning rate")
    trainer = Trainer(trial, group, logger)
    try:
        smoothed = _range_test(trainer, steps_per_epoch)
    finally:
        trainer.close()
    trainer.stop_unsaved(group.sync_status(trainer.requested_action()))  # for a signal since the last step
    del trainer
    gc.collect()
    lowest = int(np.argmin(smoothed))
    found = float(f"{rates[lowest] / 10:.2g}")
    if smoothed[lowest] >= smoothed[0]:
        raise UserError(f"--lr-find: the loss does not fall at any rate from {_LOWEST:g} on; give the rate instead")
    logger.info(
        f"--lr-find: {found:g}, a tenth of {rates[lowest]:.2g}, where the smoothed loss was lowest "
        f"({smoothed[lowest]:.4f}, at first {smoothed[0]:.4f}); its curve is in metrics.jsonl"
    )
    return found


def _range_test(trainer: Trainer, steps_per_epoch: int) -> list[float]:
    """Smoothed losses of the steps of a trainer, until they explode or its learning rates end."""
    group, average, smoothed = trainer.group, 0.0, list[float]()
    trainer.train_step.train()
    for epoch in itertools.count():
        batches = trainer.train_loader.epoch(epoch)
        for step in range(steps_per_epoch):
            trainer.watchdog.phase("finding the learning rate")
            micro_batches, error = trainer.fetch(batches)
            action = group.sync_status(trainer.requested_action(), error)
            trainer.stop_unsaved(action)
            result = trainer.train_step(epoch, step, micro_batches)
            total, count = group.all_reduce_sum([float(sum(result.losses)), len(result.losses)])
            average = _MEMORY * average + (1 - _MEMORY) * total / count
            smoothed.append(average / (1 - _MEMORY ** (len(smoothed) + 1)))
            trainer.logger.metrics(
                kind="lr_find", step=len(smoothed), lr=result.lr, loss=total / count, smoothed=smoothed[-1]
            )
            exploded = not math.isfinite(smoothed[-1]) or smoothed[-1] > _RISE * min(smoothed)
            if exploded or len(smoothed) == _NUM_RATES:
                return smoothed[:-1] if exploded else smoothed
    raise AssertionError
