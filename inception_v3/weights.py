"""Parameter names of Inception v3 in the files of Cadene, MindSpore and Keras, and here.

common/weights/{mindspore,keras}.py have already given the tensors torch's shapes and torch's names within a layer.
"""

import re

from common.spec import HALF_RANGE, IMAGENET, StateDict

Path = tuple[str | tuple[str, str], ...]  # one branch: names of its convolutions; a pair is a fork at its end

_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_POOL: Path = ("branch_pool",)
_GRID_35: tuple[Path, ...] = (
    ("branch1x1",),
    ("branch5x5_1", "branch5x5_2"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    _POOL,
)
_GRID_17: tuple[Path, ...] = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    tuple(f"branch7x7dbl_{i}" for i in range(1, 6)),
    _POOL,
)
_GRID_8: tuple[Path, ...] = (
    ("branch1x1",),
    ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
    ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    _POOL,
)
_BLOCKS: dict[str, tuple[Path, ...]] = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _GRID_35),
    "Mixed_6a": (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")),
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _GRID_17),
    "Mixed_7a": (("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{i}" for i in range(1, 5))),
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), _GRID_8),
}
# A file of MindSpore: the official model zoo's name of a part, mindcv's, ours.
_MINDSPORE_PARTS = (
    ("logits.fc", "classifier", "fc"),
    ("aux_logits", "aux", "AuxLogits"),
    *((name[:9], f"conv{name[7:9]}", name) for name in _STEM),
    *((name, f"inception{name[6:]}", name) for name in _BLOCKS),
)


def _keras_layers() -> list[tuple[str, str]]:
    """(our name of a convolution or batch norm, Keras' name) in the order of Keras' files.

    Keras numbers layers as it builds them, and stores them by their distance from the output: in a branch, a unit of
    convolution, batch norm and ReLU is three layers; the outputs of a fork are concatenated, one more.
    """
    stored = []
    number = 0
    for block, paths in {**{name: (("",),) for name in _STEM}, **_BLOCKS}.items():
        layers = []
        for path in paths:
            for position, step in enumerate(path):
                distance = 3 * (len(path) - position) + isinstance(path[-1], tuple)
                for name in step if isinstance(step, tuple) else (step,):
                    ours = f"{block}.{name}" if name else block
                    suffix = f"_{number}" if number else ""
                    layers.append((-distance, number, f"{ours}.conv", f"conv2d{suffix}"))
                    layers.append((1 - distance, number, f"{ours}.bn", f"batch_normalization{suffix}"))
                    number += 1
        stored += [layer[2:] for layer in sorted(layers)]
    return [*stored, ("fc", "predictions")]


KERAS_LAYERS = _keras_layers()


def from_torch(state_dict: StateDict) -> StateDict:
    """torchvision's and timm's names are ours; Cadene's classifier is `last_linear`."""
    return {re.sub(r"^last_linear\.", "fc.", name): tensor for name, tensor in state_dict.items()}


def from_keras(state_dict: StateDict) -> StateDict:
    """keras.applications: numbered layers, in the order in which they were built, from any number on; no scale."""
    import torch

    from common.weights import keras

    renamed = dict(keras.rename(state_dict, KERAS_LAYERS))
    for name in list(renamed):
        if name.endswith(".bn.bias"):
            renamed.setdefault(f"{name.removesuffix('bias')}weight", torch.ones_like(renamed[name]))
    return renamed


def to_keras(state_dict: StateDict) -> StateDict:
    """The inverse of `from_keras`, with the numbers of a new Keras process. Keras' batch norms have no scale: it moves
    into the convolution before them. The auxiliary head and batch counters are left out."""
    renamed = {}
    for ours, keras in KERAS_LAYERS:
        unit = ours.rpartition(".")[0]
        scale = state_dict[f"{unit}.bn.weight"] if unit else None
        for last in ("weight", "bias", "running_mean", "running_var"):
            tensor = state_dict.get(f"{ours}.{last}")
            if tensor is None or (scale is not None and ours.endswith(".bn") and last == "weight"):
                continue
            if scale is not None and last in ("weight", "running_mean"):
                tensor = tensor * scale.view(-1, *[1] * (tensor.ndim - 1))
            renamed[f"{keras}.{last}"] = tensor
    return renamed


def from_mindspore(state_dict: StateDict) -> StateDict:
    """Official model zoo and mindcv. The official auxiliary head has no batch norm, so it is left out."""
    layers = {theirs: ours for ours, both in _mindspore_layers().items() for theirs in both}
    renamed = {}
    for name, tensor in state_dict.items():
        layer, _, last = name.rpartition(".")
        if not layer.startswith("aux_logits"):
            renamed[f"{layers.get(layer, layer)}.{last}"] = tensor
    return renamed


def to_mindspore(state_dict: StateDict) -> StateDict:
    """mindcv's names."""
    layers = {ours: both[1] for ours, both in _mindspore_layers().items()}
    renamed = {}
    for name, tensor in state_dict.items():
        layer, _, last = name.rpartition(".")
        renamed[f"{layers[layer]}.{last}"] = tensor
    return renamed


def fold_transform(state_dict: StateDict, before: bool, after: bool) -> StateDict:
    """Weights for the other `transform_input`."""
    from common.weights.folding import fold_input

    inside = {True: HALF_RANGE, False: IMAGENET}  # what the first convolution reads
    return fold_input(state_dict, "Conv2d_1a_3x3.conv", "Conv2d_1a_3x3.bn", inside[before], inside[after])


def _mindspore_layers() -> dict[str, tuple[str, str]]:
    """Our layer -> its names in the official model zoo and in mindcv."""
    units = {"AuxLogits.conv0": "conv0", "AuxLogits.conv1": "conv1", **{name: "" for name in _STEM}}
    for block, paths in _BLOCKS.items():
        for index, path in enumerate(paths):
            branch = "branch_pool" if path is _POOL else f"branch{index}"
            single = sum(isinstance(step, str) for step in path) == 1
            for position, step in enumerate(path):
                if isinstance(step, tuple):
                    units.update({f"{block}.{step[0]}": f"{branch}_a", f"{block}.{step[1]}": f"{branch}_b"})
                elif path is _POOL:
                    units[f"{block}.{step}"] = f"{branch}.1"
                else:
                    units[f"{block}.{step}"] = branch if single else f"{branch}.{position}"
    layers = {"fc": ("logits.fc", "classifier"), "AuxLogits.fc": ("aux_logits.fc", "aux.fc")}
    parts = {ours: (official, mindcv) for official, mindcv, ours in _MINDSPORE_PARTS}
    for unit, inner in units.items():
        official, mindcv = (
            f"{part}.{name}".rstrip(".")
            for part, name in zip(parts[unit.partition(".")[0]], (inner, re.sub("_([ab])$", r"\1", inner)), strict=True)
        )
        for layer in ("conv", "bn"):
            layers[f"{unit}.{layer}"] = (f"{official}.{layer}", f"{mindcv}.{layer}")
    return layers
