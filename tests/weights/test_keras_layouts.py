"""Layouts of Keras' files, written with h5py as Keras 2.12 and 3.15 write them: a network within a transfer model."""

import io
import json
import zipfile

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from common.spec import ModelSpec
from common.weights import keras
from common.weights.load import load_model, load_pretrained


class Net(nn.Module):
    """A convolution, a batch norm, a separable convolution's kernels, a classifier."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.pointwise, self.fc = nn.Conv2d(4, 6, 1, bias=False), nn.Linear(6, num_classes)


LAYERS = [("conv", "conv2d"), ("bn", "batch_normalization"), ("sep", "block2_sepconv1"), ("fc", "predictions")]


def from_keras(state_dict):
    return {name.removeprefix("sep."): tensor for name, tensor in keras.rename(state_dict, LAYERS).items()}


SPEC = ModelSpec(name="net", builder=Net, build_options={"num_classes": 5}, key_maps={"keras": from_keras})
SHAPES = {
    "conv2d": {"kernel": (3, 3, 3, 4)},
    "batch_normalization": {"gamma": (4,), "beta": (4,), "moving_mean": (4,), "moving_variance": (4,)},
    "block2_sepconv1": {"depthwise_kernel": (3, 3, 4, 1), "pointwise_kernel": (1, 1, 4, 6)},
}
ARRAYS = {
    (layer, name): np.random.default_rng(i).random(shape, np.float32)
    for i, (layer, arrays) in enumerate(SHAPES.items())
    for name, shape in arrays.items()
}
HEAD = {"dense": (np.ones((6, 5), np.float32), np.zeros(5, np.float32))}
DEEP = {"dense": (np.ones((6, 8), np.float32), np.zeros(8, np.float32)), "dense_1": (np.ones((8, 5)), np.zeros(5))}


def write_h5(path, head):
    """model.save("x.h5") of Sequential([net, pooling, dense]): all that is trained, then the statistics."""
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = ["net", "global_average_pooling2d", *head]
        names = sorted(ARRAYS, key=lambda key: "moving" in key[1])
        root.create_group("net").attrs["weight_names"] = [f"{layer}/{name}:0" for layer, name in names]
        for layer, name in names:
            root["net"][f"{layer}/{name}:0"] = ARRAYS[layer, name]
        root.create_group("global_average_pooling2d").attrs["weight_names"] = []
        for layer, arrays in head.items():
            root.create_group(layer).attrs["weight_names"] = [
                f"sequential/{layer}/{name}" for name in ("kernel", "bias")
            ]
            for name, array in zip(("kernel", "bias"), arrays, strict=True):
                root[layer][f"sequential/{layer}/{name}"] = array


def write_weights_h5(path, head, below="layers", step=1, named=False):
    """save_weights("x.weights.h5"); Keras 2.12: another name of the groups, and numbers that count by two."""
    kinds = {"conv2d": "conv2d", "batch_normalization": "batch_normalization", "block2_sepconv1": "separable_conv2d"}
    with h5py.File(path, "w") as file:
        for layer, kind in kinds.items():
            group = file.create_group(f"{below}/functional/{below}/{kind}/vars")
            if named:
                group.attrs["name"] = layer
            for i, name in enumerate(SHAPES[layer]):
                group[str(i)] = ARRAYS[layer, name]
        file.create_group(f"{below}/functional/{below}/activation_{step}/vars")
        for k, (layer, arrays) in enumerate(head.items()):
            group = file.create_group(f"{below}/dense{f'_{k * step}' if k else ''}/vars")
            if named:
                group.attrs["name"] = layer
            group["0"], group["1"] = arrays


def write_keras(path, head):
    """An archive whose names are in its description alone."""
    content = io.BytesIO()
    write_weights_h5(content, head)
    classes = {"Conv2D": "conv2d", "BatchNormalization": "batch_normalization", "SeparableConv2D": "block2_sepconv1"}
    inner = [{"class_name": kind, "config": {"name": name}} for kind, name in classes.items()]
    layers = [{"class_name": "Functional", "config": {"name": "net", "layers": inner}}]
    layers += [{"class_name": "Dense", "config": {"name": name}} for name in head]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": layers}}))
        archive.writestr("model.weights.h5", content.getvalue())


WRITERS = {
    "a.h5": write_h5,
    "a.weights.h5": write_weights_h5,
    "named.weights.h5": lambda path, head: write_weights_h5(path, head, named=True),
    "2.12.weights.h5": lambda path, head: write_weights_h5(path, head, "_layer_checkpoint_dependencies", 2),
    "a.keras": write_keras,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_network_within_a_model_is_read_with_its_classifier(name, tmp_path):
    WRITERS[name](tmp_path / name, HEAD)
    state = load_model(tmp_path / name, SPEC)[0].state_dict()
    assert torch.equal(state["conv.weight"].permute(2, 3, 1, 0), torch.from_numpy(ARRAYS["conv2d", "kernel"]))
    for ours, theirs in (("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean")):
        assert torch.equal(state[f"bn.{ours}"], torch.from_numpy(ARRAYS["batch_normalization", theirs]))
    assert torch.equal(state["bn.running_var"], torch.from_numpy(ARRAYS["batch_normalization", "moving_variance"]))
    pointwise = torch.from_numpy(ARRAYS["block2_sepconv1", "pointwise_kernel"])
    assert torch.equal(state["pointwise.weight"].permute(2, 3, 1, 0), pointwise)
    assert state["fc.weight"].shape == (5, 6)


@pytest.mark.parametrize("name", WRITERS)
def test_another_head_is_left_out_by_pretrained_alone(name, tmp_path):
    """Two dense layers are no classifier of ours: a training takes the rest, an evaluation would be of another network."""
    WRITERS[name](tmp_path / name, DEEP)
    _, state, notes = load_pretrained(tmp_path / name, SPEC, {"num_classes": 5}, set())
    assert notes[0] == "--pretrained: fc is not in the file; initialized anew"
    assert notes[1].startswith("--pretrained: left out ") and notes[1].count("dense") >= 2
    assert state["fc.weight"].shape == (5, 6) and state["conv.weight"].shape == (4, 3, 3, 3)
    with pytest.raises(UserError, match="does not fit net, 6 names or shapes differ .2 missing, 4 unexpected"):
        load_model(tmp_path / name, SPEC)
