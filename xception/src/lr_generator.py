"""Learning-rate modes of MindSpore's model zoo, number for number, each a pure function of the step.

Step i of T = total, W = warm warm-up steps; `steps` has no warm-up.
"""

import math
from collections.abc import Callable

from common.errors import UserError
from common.train.schedules import Schedule
from xception.src.config import XceptionConfig


def linear(i: int, total: int, warm: int, lr_init: float, lr_max: float, lr_end: float) -> float:
    """Linear from lr_init to lr_max over the warm-up, then linear to lr_end."""
    if i < warm:
        return lr_init + (lr_max - lr_init) * i / warm
    return lr_max - (lr_max - lr_end) * (i - warm) / (total - warm)


def steps(i: int, total: int, warm: int, lr_init: float, lr_max: float, lr_end: float) -> float:
    """lr_max times 1, 0.1, 0.01, 0.001, with edges at 0.3 T, 0.6 T and 0.8 T."""
    return lr_max * 0.1 ** sum(i >= edge * total for edge in (0.3, 0.6, 0.8))


def poly(i: int, total: int, warm: int, lr_init: float, lr_max: float, lr_end: float) -> float:
    """The linear warm-up, then a parabola to 0."""
    if i < warm:
        return lr_init + (lr_max - lr_init) * i / warm
    return lr_max * max(0.0, 1.0 - (i - warm) / (total - warm)) ** 2


def cosine(i: int, total: int, warm: int, lr_init: float, lr_max: float, lr_end: float) -> float:
    """Linear decay times nearly half a cosine; D = T - W, and i counts on from the warm-up, as in the original."""
    if i < warm:
        return lr_init + (lr_max - lr_init) * (i + 1) / warm
    decay = total - warm
    return lr_max * ((total - i) / decay * 0.5 * (1.0 + math.cos(2.0 * math.pi * 0.47 * i / decay)) + 1e-5)


MODES = {"linear": linear, "steps": steps, "poly": poly, "cosine": cosine}


def mode(name: str, log: Callable[[str], None] | None = None) -> str:
    """The mode of a --lr_decay_mode; `liner`, the package's spelling in its Ascend recipe, is `linear` and is logged.

    Raises:
      UserError: an unknown mode (the original took any word for `linear`).
    """
    if name == "liner":
        if log is not None:
            log("lr_decay_mode: 'liner' is read as 'linear'")
        return "linear"
    if name not in MODES:
        raise UserError(f"--lr-decay-mode: {name}, must be one of {', '.join(MODES)}")
    return name


def _schedule(name: str) -> Schedule:
    """The mode as a schedule of common/train/schedules.py."""

    def factory(config: XceptionConfig, steps_per_epoch: int) -> Callable[[int, int], float]:
        total, warm = config.epochs * steps_per_epoch, config.warm_up_epochs * steps_per_epoch

        def lr(epoch: int, step: int) -> float:
            i = epoch * steps_per_epoch + step
            return MODES[mode(name)](i, total, warm, config.lr_init, config.lr, config.lr_end)

        return lr

    return factory


SCHEDULES: dict[str, Schedule] = {name: _schedule(name) for name in (*MODES, "liner")}
