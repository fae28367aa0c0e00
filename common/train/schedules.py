"""Learning rates as pure functions of (epoch, step): a checkpoint needs no schedule state."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import UserError

# (config, steps per epoch) -> lr(epoch, step), both counted from 0. The config is a TrainConfig, or a model's subclass.
Schedule = Callable[[Any, int], Callable[[int, int], float]]


def cosine_epoch(config: Any, steps_per_epoch: int) -> Callable[[int, int], float]:
    """Cosine over epochs, constant within one: lr * 0.5 * (1 + cos(pi * (e - W) / (E - W))) after W warm-up epochs at
    lr * (e + 1) / (W + 1). The schedule of the reported Ascend results."""
    warm, epochs = config.warm_up_epochs, config.epochs

    def lr(epoch: int, step: int) -> float:
        if epoch < warm:
            return config.lr * (epoch + 1) / (warm + 1)
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * (epoch - warm) / (epochs - warm)))

    return lr


def cosine_step(config: Any, steps_per_epoch: int) -> Callable[[int, int], float]:
    """Cosine over steps after a linear warm-up of T steps: step t of it has lr * (t + 1) / T."""
    warm, total = config.warm_up_epochs * steps_per_epoch, config.epochs * steps_per_epoch

    def lr(epoch: int, step: int) -> float:
        t = epoch * steps_per_epoch + step
        if t < warm:
            return config.lr * (t + 1) / warm
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * (t - warm) / (total - warm)))

    return lr


def constant(config: Any, steps_per_epoch: int) -> Callable[[int, int], float]:
    """The peak rate throughout."""
    return lambda epoch, step: config.lr


SCHEDULES: dict[str, Schedule] = {"cosine-epoch": cosine_epoch, "cosine-step": cosine_step, "constant": constant}


def make(config: Any, steps_per_epoch: int, extra: Mapping[str, Schedule] | None = None) -> Callable[[int, int], float]:
    """The function lr(epoch, step) of a TrainConfig; `extra` adds a model's own schedules by name.

    Raises:
      UserError: an unknown name.
    """
    known = {**SCHEDULES, **(extra or {})}
    if config.lr_schedule not in known:
        raise UserError(f"--lr-schedule: {config.lr_schedule}, must be one of {', '.join(known)}")
    return known[config.lr_schedule](config, steps_per_epoch)
