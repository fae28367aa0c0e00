"""Learning rates as pure functions of (epoch, step): nothing to save, nothing to restore."""

import math

from common.errors import UserError


def cosine_epoch(config, steps_per_epoch):
    """Cosine over epochs, constant within one: lr * 0.5 * (1 + cos(pi * (e - W) / (E - W))), W warm-up epochs before
    it at lr * (e + 1) / (W + 1). This is the schedule of the reported Ascend results."""
    warm, epochs = config.warm_up_epochs, config.epochs

    def lr(epoch, step):
        if epoch < warm:
            return config.lr * (epoch + 1) / (warm + 1)
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * (epoch - warm) / (epochs - warm)))

    return lr


def cosine_step(config, steps_per_epoch):
    """Cosine over steps after a linear warm-up: step t of the warm-up's T has lr * (t + 1) / T."""
    warm, total = config.warm_up_epochs * steps_per_epoch, config.epochs * steps_per_epoch

    def lr(epoch, step):
        t = epoch * steps_per_epoch + step
        if t < warm:
            return config.lr * (t + 1) / warm
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * (t - warm) / (total - warm)))

    return lr


def constant(config, steps_per_epoch):
    """The peak rate throughout."""
    return lambda epoch, step: config.lr


SCHEDULES = {"cosine-epoch": cosine_epoch, "cosine-step": cosine_step, "constant": constant}


def make(config, steps_per_epoch, extra=None):
    """The function lr(epoch, step) of a TrainConfig; `extra` adds a model's own schedules by name.

    Raises:
      UserError: an unknown name.
    """
    known = {**SCHEDULES, **(extra or {})}
    if config.lr_schedule not in known:
        raise UserError(f"--lr-schedule: {config.lr_schedule}, must be one of {', '.join(known)}")
    return known[config.lr_schedule](config, steps_per_epoch)
