"""Throughput and training loss, without a device synchronization at every step."""

import contextlib
import datetime
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from common.device.device import Device
from common.distributed import Group
from common.train.step import StepResult


class Throughput:
    """Images per second over all ranks, without the first steps of the process, evaluation and checkpoints."""

    def __init__(self, device: Device, skip_steps: int, images_per_step: int) -> None:
        self._device, self._skip_steps, self._images_per_step = device, skip_steps, images_per_step
        self._steps, self._seconds = 0, 0.0
        self._skipped = (0, 0.0)  # the first steps and their seconds
        self._started: float | None = None

    def start(self) -> None:
        """Start the clock."""
        self._device.synchronize()
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock."""
        if self._started is not None:
            self._device.synchronize()
            self._seconds += time.perf_counter() - self._started
            self._started = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock within the block, if it runs."""
        running = self._started is not None
        self.stop()
        yield
        if running:
            self.start()

    def step(self) -> None:
        """Count a step."""
        self._steps += 1
        if self._steps == self._skip_steps:
            with self.paused():
                self._skipped = (self._steps, self._seconds)

    @property
    def skipped_steps(self) -> int:
        """First steps that are not in the number: none where there are no others."""
        return self._skipped[0] if self._steps > self._skipped[0] else 0

    @property
    def images_per_s(self) -> float:
        if self._steps == 0:
            return 0.0
        steps, seconds = self._skipped if self.skipped_steps else (0, 0.0)
        return (self._steps - steps) * self._images_per_step / (self._seconds - seconds)


class TrainMetrics(NamedTuple):
    """Means since the last progress line: loss, top-1 in percent; loss and learning rate of the last step alone."""

    loss: float
    acc1: float
    last_loss: float
    lr: float


class TimeLeft(NamedTuple):
    """Estimated seconds to the end of the epoch's steps, and to the end of the run with its validations."""

    epoch_s: float
    run_s: float

    def __str__(self) -> str:
        run = f"{datetime.timedelta(seconds=round(self.run_s))} of the run"
        if self.epoch_s < 0.5:
            return run
        return f"{datetime.timedelta(seconds=round(self.epoch_s))} of the epoch, {run}"


def time_left(
    done: int, epochs: int, steps_per_epoch: int, max_steps: int | None, step_s: float, validation_s: float
) -> TimeLeft:
    """Time left after `done` steps of a run, all its epochs counted.

    Args:
      max_steps: value of --max-steps.
      step_s: seconds of a step.
      validation_s: seconds of a validation, one of which ends every epoch and the run; 0 where it is not known.
    """
    total = min(epochs * steps_per_epoch, epochs * steps_per_epoch if max_steps is None else max_steps)
    epoch = (done - 1) // steps_per_epoch  # that of the last step
    in_epoch = min((epoch + 1) * steps_per_epoch, total) - done
    validations = (total - 1) // steps_per_epoch - epoch + 1
    return TimeLeft(in_epoch * step_s, (total - done) * step_s + validations * validation_s)


class LossMeter:
    """Loss and accuracy since the last progress line; values stay on the device until they are read.

    Attributes:
      last_mean: mean loss of the last progress line; 0 before the first.
    """

    def __init__(self) -> None:
        self.reset()
        self.last_mean = 0.0
        self._unchecked: list[tuple[int, int, torch.Tensor]] = []

    def reset(self) -> None:
        self._results: list[StepResult] = []
        self._started = time.perf_counter()

    def add(self, epoch: int, step: int, result: StepResult) -> None:
        """Add a step; epoch and step are counted from 0."""
        self._results.append(result)
        self._unchecked += [(epoch, step, loss) for loss in result.losses]

    def first_non_finite(self) -> tuple[int, int, float] | None:
        """(epoch, step, loss) of the first micro-batch since the last call whose loss is NaN or infinite, or None."""
        pending, self._unchecked = self._unchecked, []
        if not pending:
            return None
        values = torch.stack([loss for _, _, loss in pending]).tolist()
        return next(((e, s, v) for (e, s, _), v in zip(pending, values, strict=True) if not math.isfinite(v)), None)

    def means(self, group: Group) -> TrainMetrics:
        """Means over all ranks; a collective call after at least one step."""
        losses = torch.stack([loss for result in self._results for loss in result.losses]).cpu().double()
        correct = int(torch.stack([hits for result in self._results for hits in result.correct]).sum())
        seen = sum(result.num_images for result in self._results)
        last = losses[len(losses) - len(self._results[-1].losses) :]
        local = [float(losses.sum()), len(losses), correct, seen, float(last.sum()), len(last)]
        loss_sum, count, correct_sum, seen_sum, last_sum, last_count = group.all_reduce_sum(local)
        lr, self.last_mean = self._results[-1].lr, loss_sum / count
        return TrainMetrics(self.last_mean, 100.0 * correct_sum / seen_sum, last_sum / last_count, lr)

    def images_per_s(self, images_per_step: int) -> float:
        """Throughput since the last reset, everything included."""
        return len(self._results) * images_per_step / (time.perf_counter() - self._started)
