"""Golden arithmetic of learning rates and losses, written out."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from support import ROOT
from timm.loss import BinaryCrossEntropy

from common.config import TrainConfig
from common.device.device import Device
from common.errors import UserError
from common.train import losses, optim, schedules

SEED_8P = dataclasses.replace(TrainConfig(), lr=1.2, epochs=240)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, 1.2),
        (1, 1.2 * 0.5 * (1 + math.cos(math.pi / 240))),
        (120, 0.6),
        (239, 1.2 * 0.5 * (1 - math.cos(math.pi / 240))),
    ],
)
def test_epoch_cosine_of_the_reported_recipe(epoch, expected):
    lr = schedules.make(SEED_8P, 625)
    assert lr(epoch, 0) == pytest.approx(expected, rel=1e-12)
    assert lr(epoch, 624) == lr(epoch, 0)


def test_last_epoch_of_the_reported_recipe_is_five_e_minus_five():
    assert schedules.make(SEED_8P, 625)(239, 0) == pytest.approx(5.1e-5, rel=0.01)


def test_epoch_warm_up_rises_to_the_peak():
    lr = schedules.make(dataclasses.replace(SEED_8P, warm_up_epochs=3), 625)
    assert [lr(epoch, 0) for epoch in range(4)] == pytest.approx([0.3, 0.6, 0.9, 1.2])


def test_step_cosine_warms_up_by_step_and_ends_near_zero():
    lr = schedules.make(dataclasses.replace(SEED_8P, lr_schedule="cosine-step", warm_up_epochs=2, epochs=10), 5)
    assert [lr(0, 0), lr(0, 4), lr(1, 4)] == pytest.approx([0.12, 0.6, 1.2])
    assert lr(2, 0) == pytest.approx(1.2)
    assert lr(6, 0) == pytest.approx(0.6)  # half of the 40 steps after the warm-up
    assert lr(9, 4) == pytest.approx(1.2 * 0.5 * (1 + math.cos(math.pi * 39 / 40)))


def test_an_unknown_schedule_names_the_known_ones():
    with pytest.raises(UserError, match="--lr-schedule: banana, must be one of cosine-epoch, cosine-step, constant"):
        schedules.make(dataclasses.replace(SEED_8P, lr_schedule="banana"), 5)


LOGITS = torch.log(torch.tensor([[1.0, 1.0, 2.0]]))  # probabilities 1/4, 1/4, 1/2
LABEL = torch.tensor([2])


def test_smoothing_over_all_classes_by_hand():
    expected = 0.9 * math.log(2) + 0.1 * (math.log(4) + math.log(4) + math.log(2)) / 3
    assert losses.smoothed_cross_entropy(LOGITS, LABEL, 0.1).item() == pytest.approx(expected, rel=1e-6)


def test_smoothing_over_the_other_classes_by_hand():
    expected = 0.9 * math.log(2) + 0.1 * (math.log(4) + math.log(4)) / 2
    assert losses.smoothed_cross_entropy(LOGITS, LABEL, 0.1, smoothing_targets="others").item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(
    ("smoothing", "threshold", "targets"),
    [
        (0.0, None, (0, 0, 1)),
        (0.3, None, (0.1, 0.1, 0.8)),
        (0.3, 0.8, (0, 0, 0)),  # above it, not equal to it
        (0.3, 0.05, (1, 1, 1)),
    ],
)
def test_binary_cross_entropy_by_hand_and_as_timm(smoothing, threshold, targets):
    logits = torch.tensor([[0.0, math.log(3), -math.log(3)]])  # probabilities 1/2, 3/4, 1/4
    chances = (0.5, 0.75, 0.25)
    expected = -sum(y * math.log(p) + (1 - y) * math.log(1 - p) for y, p in zip(targets, chances, strict=True)) / 3
    assert losses.binary_cross_entropy(logits, LABEL, smoothing, threshold).item() == pytest.approx(expected, rel=1e-6)
    theirs = BinaryCrossEntropy(smoothing, threshold)(logits, LABEL).item()
    assert theirs == pytest.approx(expected, rel=1e-6)


def test_binary_cross_entropy_of_mixed_targets_by_hand():
    """timm smooths both labels before it mixes them: 0.7 (0.9, 0.05, 0.05) + 0.3 (0.05, 0.05, 0.9) of 0.15 on three."""
    logits, mixed = torch.zeros(1, 3), torch.tensor([[0.7, 0.0, 0.3]])
    logits[0, 0] = math.log(4)  # probability 0.8
    expected = -(0.645 * math.log(0.8) + 0.355 * math.log(0.2) + 2 * math.log(0.5)) / 3
    assert losses.binary_cross_entropy(logits, mixed, 0.15).item() == pytest.approx(expected, rel=1e-6)
    above = -(math.log(0.8) + 2 * math.log(0.5)) / 3  # 0.645 is above, 0.05 and 0.305 are not
    assert losses.binary_cross_entropy(logits, mixed, 0.15, 0.5).item() == pytest.approx(above, rel=1e-6)


def test_a_threshold_without_bce_is_refused():
    with pytest.raises(UserError, match="--bce-target-thresh: 0.2, needs --bce"):
        TrainConfig(bce_target_thresh=0.2)


def test_both_heads_are_smoothed_and_the_auxiliary_one_counts_by_its_weight():
    config = dataclasses.replace(TrainConfig(), label_smoothing=0.1)
    one = losses.smoothed_cross_entropy(LOGITS, LABEL, 0.1)
    other = losses.smoothed_cross_entropy(-LOGITS, LABEL, 0.1)
    for weight in (0.4, 0.7):
        loss = losses.training_loss((LOGITS, -LOGITS), LABEL, config, weight)
        assert loss.item() == pytest.approx((one + weight * other).item())
        assert losses.training_loss(LOGITS, LABEL, config, weight).item() == pytest.approx(one.item())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # v = 0.9 v + g: gradients 1 and 3 move 0.1 * (1 + 3.9).
        (dict(optimizer="sgd"), 2 - 0.1 * (1 + 3.9)),
        # Square averages 0.1 and 0.99; momentum 0.9 carries the first step into the second.
        (dict(optimizer="rmsprop"), 2 - 0.1 * (1.9 * 1 / (0.1**0.5 + 1) + 3 / (0.99**0.5 + 1))),
        # Bias-corrected moments: 1 / 1, then (0.09 + 0.3) / 0.19 over the root of (0.000999 + 0.009) / 0.001999.
        (dict(optimizer="adamw"), 2 - 0.1 * (1 + (0.39 / 0.19) / (0.009999 / 0.001999) ** 0.5)),
    ],
)
def test_two_steps_of_each_optimizer_by_hand(options, expected):
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 2.0)
    config = dataclasses.replace(TrainConfig(), lr=0.1, weight_decay=0.0, **options)
    optimizer = optim.make_optimizer(layer, config, Device("cpu"))
    for gradient in (1.0, 3.0):
        layer.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
    assert layer.weight.item() == pytest.approx(expected, rel=1e-5)


SLOW_IMPORTS = """
import sys, torch
from common.config import TrainConfig
from common.data import augment, jpeg
from common.device.device import Device
from common.train import losses, optim
jpeg._simplejpeg = lambda: None
augment.TrainTransform(TrainConfig(color_jitter=0.4, decoder="fast"))
layer = torch.nn.Linear(1, 1)
for kind in ("sgd", "rmsprop", "adamw"):
    config = TrainConfig(optimizer=kind)
    optimizer = optim.make_optimizer(layer, config, Device("cpu"))
    layer(torch.ones(1, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    optim.load_state(optimizer, optimizer.state_dict())
    assert losses.mixer(config, 10) is None
print([name for name in ("torch._dynamo", "torchvision", "onnx") if name in sys.modules])
"""


def test_training_imports_neither_torch_compile_nor_torchvision():
    """Each takes about a second of every rank's start."""
    command = [sys.executable, "-c", SLOW_IMPORTS]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "[]\n"
