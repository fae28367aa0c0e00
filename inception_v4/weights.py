"""Parameter names of Inception v4 in MindSpore's files, and here; timm's and Cadene's are ours.

common/weights/mindspore.py has already given the tensors torch's shapes and torch's names within a layer.
"""

import re
import typing

from common.spec import HALF_RANGE, IMAGENET, StateDict

if typing.TYPE_CHECKING:
    import torch

# Units of the stem, whose blocks MindSpore counts as one: mindcv's and the official model zoo's name, ours.
_STEM = (
    ("conv2d_1a_3x3", "0"),
    ("conv2d_2a_3x3", "1"),
    ("conv2d_2b_3x3", "2"),
    ("mixed_3a_branch_1", "3.conv"),
    *((f"mixed_4a_branch_0.{i}", f"4.branch0.{i}") for i in range(2)),
    *((f"mixed_4a_branch_1.{i}", f"4.branch1.{i}") for i in range(4)),
    ("mixed_5a_branch_0", "5.conv"),
)
_STEM_BLOCKS = 6  # ours
# Units of the last three blocks, whose branches fork.
_FORKS = (
    ("branch_1", "branch1_0"),
    ("branch_1_1", "branch1_1a"),
    ("branch_1_2", "branch1_1b"),
    *((f"branch_2.{i}", f"branch2_{i}") for i in range(3)),
    ("branch_2_1", "branch2_3a"),
    ("branch_2_2", "branch2_3b"),
)
_FORKED_BLOCKS = range(19, 22)  # ours
_OFFICIAL_EPS, _EPS = 1e-5, 1e-3
_FIRST = ("features.0.conv", "features.0.bn")


def _ours(layer: str) -> str:
    """Our name of a layer of mindcv's network."""
    layer = re.sub(r"^classifier$", "last_linear", layer)
    match = re.fullmatch(r"features\.(\d+)\.(.*)\.(conv|bn)", layer)
    if match is None:
        return layer
    block, unit, last = int(match[1]), match[2], match[3]
    if block == 0:
        return f"features.{dict(_STEM).get(unit, unit)}.{last}"
    block += _STEM_BLOCKS - 1
    forked = dict(_FORKS).get(unit, unit) if block in _FORKED_BLOCKS else unit
    return f"features.{block}.{re.sub(r'^branch_', 'branch', forked)}.{last}"


def _mindcv(layer: str) -> str:
    """The inverse of `_ours`."""
    match = re.fullmatch(r"features\.(\d+)\.?(.*)\.(conv|bn)", layer)
    if match is None:
        return re.sub(r"^last_linear$", "classifier", layer)
    block, unit, last = int(match[1]), match[2], match[3]
    if block < _STEM_BLOCKS:
        theirs = {ours: theirs for theirs, ours in _STEM}
        return f"features.0.{theirs[f'{block}.{unit}'.rstrip('.')]}.{last}"
    if block in _FORKED_BLOCKS:
        unit = {ours: theirs for theirs, ours in _FORKS}.get(unit, unit)
    return f"features.{block - _STEM_BLOCKS + 1}.{re.sub(r'^branch(?=[0-9])', 'branch_', unit)}.{last}"


def _renamed(state_dict: StateDict, rename: typing.Callable[[str], str]) -> "dict[str, torch.Tensor]":
    return {
        f"{rename(name.rpartition('.')[0])}.{name.rpartition('.')[2]}": tensor for name, tensor in state_dict.items()
    }


def from_mindspore(state_dict: StateDict) -> StateDict:
    """mindcv, and the official model zoo, whose two batch norms around the classifier become part of it.

    Both normalize images with ImageNet's mean and standard deviation (`dataset.py`; mindcv's `config.py`).
    """
    from common.weights.folding import fold_eps, fold_input

    if "softmax.dense.weight" not in state_dict:
        return fold_input(_renamed(state_dict, _ours), *_FIRST, IMAGENET, HALF_RANGE)

    units = {
        name.replace(".conv.conv.", ".conv.").replace(".conv.batchnorm.", ".bn."): tensor
        for name, tensor in state_dict.items()
        if name.startswith("features.")
    }
    first_scale, first_shift = _affine(state_dict, "bn0", _EPS)
    last_scale, last_shift = _affine(state_dict, "softmax.batchnorm", _OFFICIAL_EPS)
    weight, bias = state_dict["softmax.dense.weight"].double(), state_dict["softmax.dense.bias"].double()
    classifier = {
        "last_linear.weight": (last_scale[:, None] * weight * first_scale).float(),
        "last_linear.bias": (last_scale * (weight @ first_shift + bias) + last_shift).float(),
    }
    renamed = fold_eps(_renamed(units, _ours), _OFFICIAL_EPS, _EPS)
    return {**fold_input(renamed, *_FIRST, IMAGENET, HALF_RANGE), **classifier}


def to_mindspore(state_dict: StateDict) -> StateDict:
    """mindcv's names and normalization."""
    from common.weights.folding import fold_input

    return _renamed(fold_input(state_dict, *_FIRST, HALF_RANGE, IMAGENET), _mindcv)


def _affine(state_dict: StateDict, layer: str, eps: float) -> "tuple[torch.Tensor, torch.Tensor]":
    """Scale and shift that a batch norm applies in evaluation."""
    weight, bias, mean, var = (
        state_dict[f"{layer}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / (var + eps).sqrt()
    return scale, bias - mean * scale
