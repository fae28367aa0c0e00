"""Xception's learning rates and loss, against the formulas written out."""
import math

import pytest
import torch

from common.errors import UserError
from xception.src import lr_generator
from xception.src.loss import CrossEntropySmooth

RATES = {"lr_init": 4e-5, "lr_max": 0.4, "lr_end": 4e-5}


def rates(mode, steps_per_epoch, epochs=250, warm_up_epochs=1):
    """The whole list of a run."""
    total, warm = steps_per_epoch * epochs, steps_per_epoch * warm_up_epochs
    return [lr_generator.MODES[mode](i, total, warm, **RATES) for i in range(total)]


@pytest.mark.parametrize("steps", [5, 1251])
def test_linear(steps):
    lr, total = rates("linear", steps), 250 * steps
    assert lr[0] == 4e-5
    assert lr[1] == pytest.approx(4e-5 + (0.4 - 4e-5) / steps)
    assert lr[steps - 1] == pytest.approx(0.4 - (0.4 - 4e-5) / steps)
    assert lr[steps] == 0.4
    assert lr[steps + 249 * steps // 2] == pytest.approx(0.4 - (0.4 - 4e-5) * (249 * steps // 2) / (249 * steps))
    assert lr[total - 1] == pytest.approx(4e-5 + (0.4 - 4e-5) / (249 * steps))


@pytest.mark.parametrize("steps", [5, 1251])
def test_steps(steps):
    lr, total = rates("steps", steps), 250 * steps
    assert lr[0] == 0.4  # no warm-up
    for edge, before, after in ((0.3, 0.4, 0.04), (0.6, 0.04, 0.004), (0.8, 0.004, 0.0004)):
        i = math.ceil(edge * total)
        assert lr[i - 1] == pytest.approx(before)
        assert lr[i] == pytest.approx(after)
    assert lr[total - 1] == pytest.approx(0.0004)


@pytest.mark.parametrize("steps", [5, 1251])
def test_poly(steps):
    lr, total = rates("poly", steps), 250 * steps
    assert lr[0] == 4e-5
    assert lr[steps - 1] == pytest.approx(0.4 - (0.4 - 4e-5) / steps)
    assert lr[steps] == 0.4
    assert lr[100 * steps] == pytest.approx(0.4 * (150 / 249) ** 2)
    assert lr[total - 1] == pytest.approx(0.4 * (1 / (249 * steps)) ** 2)


@pytest.mark.parametrize("steps", [5, 1251])
def test_cosine(steps):
    lr, total = rates("cosine", steps), 250 * steps
    assert lr[0] == pytest.approx(4e-5 + (0.4 - 4e-5) / steps)
    assert lr[steps - 1] == pytest.approx(0.4)
    decay = 249 * steps
    assert lr[steps] == pytest.approx(0.4 * (0.5 * (1 + math.cos(0.94 * math.pi * steps / decay)) + 1e-5))
    i = 125 * steps
    assert lr[i] == pytest.approx(0.4 * ((125 / 249) * 0.5 * (1 + math.cos(0.94 * math.pi * 125 / 249)) + 1e-5))
    end = 0.5 * (1 + math.cos(0.94 * math.pi * (total - 1) / decay))
    assert lr[total - 1] == pytest.approx(0.4 * (end / decay + 1e-5))


def test_no_warm_up_starts_at_the_top():
    assert rates("linear", 5, warm_up_epochs=0)[0] == rates("poly", 5, warm_up_epochs=0)[0] == 0.4


def test_liner_is_linear_and_says_so_and_other_words_are_errors():
    said = []
    assert lr_generator.mode("liner", said.append) == "linear"
    assert said == ["lr_decay_mode: 'liner' is read as 'linear'"]
    assert lr_generator.mode("poly", said.append) == "poly"
    assert len(said) == 1
    with pytest.raises(UserError, match="--lr-decay-mode: exponential, must be one of linear, steps, poly, cosine"):
        lr_generator.mode("exponential")


def test_smoothing_by_hand():
    """Three classes, factor 0.1: targets 0.9 and twice 0.05."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    log_p = [[x - math.log(sum(math.exp(y) for y in row)) for x in row] for row in logits.tolist()]
    expected = -(0.9 * log_p[0][0] + 0.05 * log_p[0][1] + 0.05 * log_p[0][2]
                 + 0.05 * log_p[1][0] + 0.9 * log_p[1][1] + 0.05 * log_p[1][2]) / 2
    assert float(CrossEntropySmooth(logits, torch.tensor([0, 1]), 0.1)) == pytest.approx(expected, rel=1e-6)
    plain = -(log_p[0][0] + log_p[1][1]) / 2
    assert float(CrossEntropySmooth(logits, torch.tensor([0, 1]), 0.0)) == pytest.approx(plain, rel=1e-6)
