"""The learning rates of the seed's recipes, each a pure function of the step (so resuming needs no state).

Step i of T, W warm-up steps; `steps` has no warm-up. All modes are those of MindSpore's model zoo, number for number.
"""

import math

from common.errors import UserError


def linear(i, total, warm, lr_init, lr_max, lr_end):
    """Up from lr_init to lr_max over the warm-up, then down to lr_end on a straight line."""
    if i < warm:
        return lr_init + (lr_max - lr_init) * i / warm
    return lr_max - (lr_max - lr_end) * (i - warm) / (total - warm)


def steps(i, total, warm, lr_init, lr_max, lr_end):
    """lr_max times 1, 0.1, 0.01, 0.001, with edges at 0.3 T, 0.6 T and 0.8 T."""
    return lr_max * 0.1 ** sum(i >= edge * total for edge in (0.3, 0.6, 0.8))


def poly(i, total, warm, lr_init, lr_max, lr_end):
    """The linear warm-up, then a parabola to 0."""
    if i < warm:
        return lr_init + (lr_max - lr_init) * i / warm
    return lr_max * max(0.0, 1.0 - (i - warm) / (total - warm)) ** 2


def cosine(i, total, warm, lr_init, lr_max, lr_end):
    """Linear decay times nearly half a cosine; D = T - W, and i counts on from the warm-up (as in the original)."""
    if i < warm:
        return lr_init + (lr_max - lr_init) * (i + 1) / warm
    decay = total - warm
    return lr_max * ((total - i) / decay * 0.5 * (1.0 + math.cos(2.0 * math.pi * 0.47 * i / decay)) + 1e-5)


MODES = {"linear": linear, "steps": steps, "poly": poly, "cosine": cosine}


def mode(word, say=print):
    """The mode that a word names; `liner`, as the seed's Ascend recipe spells it, is `linear`, and `say` says so.

    Raises:
      UserError: another word (the original took any word for `linear` without telling).
    """
    if word == "liner":
        say("lr_decay_mode: 'liner' is read as 'linear'")
        return "linear"
    if word not in MODES:
        raise UserError(f"--lr-decay-mode: {word}, must be one of {', '.join(MODES)}")
    return word


def _schedule(word):
    """The mode as a schedule of common/train/schedules.py."""

    def factory(config, steps_per_epoch):
        total, warm = config.epochs * steps_per_epoch, config.warm_up_epochs * steps_per_epoch

        def lr(epoch, step):
            i = epoch * steps_per_epoch + step
            return MODES[mode(word, _silent)](i, total, warm, config.lr_init, config.lr, config.lr_end)

        return lr

    return factory


def _silent(line):
    pass


SCHEDULES = {word: _schedule(word) for word in (*MODES, "liner")}
