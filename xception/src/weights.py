"""Xception's layers in the weight files of the world: which name is which, in both directions.

Layers have torch's shapes and torch's last names here (common/mindspore_ckpt.py and common/keras_h5.py see to that).
"""

import re


def _keras_layers():
    """Our layer name -> the one of keras.applications.Xception, in the order of Keras' files."""
    layers = {"conv1": "block1_conv1", "bn1": "block1_conv1_bn", "conv2": "block1_conv2", "bn2": "block1_conv2_bn"}
    shortcuts = 0
    for block in range(1, 13):
        for i in range(3 if 4 <= block <= 11 else 2):
            position, keras = 3 * i + (block > 1), f"block{block + 1}_sepconv{i + 1}"
            layers[f"block{block}.rep.{position}"], layers[f"block{block}.rep.{position + 1}"] = keras, keras + "_bn"
        if block in (1, 2, 3, 12):  # the shortcuts have no names of their own: Keras numbers them
            number = f"_{shortcuts}" if shortcuts else ""
            layers[f"block{block}.skip"] = f"conv2d{number}"
            layers[f"block{block}.skipbn"] = f"batch_normalization{number}"
            shortcuts += 1
    return layers | {
        "conv3": "block14_sepconv1",
        "bn3": "block14_sepconv1_bn",
        "conv4": "block14_sepconv2",
        "bn4": "block14_sepconv2_bn",
        "fc": "predictions",
    }


KERAS_LAYERS = _keras_layers()


def from_torch(state_dict):
    """Cadene's and timm's files: the head may be `last_linear`, old files hold pointwise kernels as matrices."""
    ours = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"^last_linear\.", "fc.", name)
        if name.endswith(".pointwise.weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        ours[name] = tensor
    return ours


def from_mindspore(state_dict):
    """The official model zoo has our names; mindcv's head is `classifier`, and its blocks may be a list from 0."""

    def ours(name):
        name = re.sub(r"^classifier\.", "fc.", name)
        return re.sub(r"^blocks\.(\d+)\.", lambda match: f"block{int(match[1]) + 1}.", name)

    return {ours(name): tensor for name, tensor in state_dict.items()}


def from_keras(state_dict):
    """keras.applications: layers have other names, and the numbers of the shortcuts depend on what was built before."""
    ours = {keras: layer for layer, keras in KERAS_LAYERS.items()}
    for prefix in ("conv2d", "batch_normalization"):
        numbered = re.compile(rf"{prefix}(_\d+)?")
        shortcuts = [layer for keras, layer in ours.items() if numbered.fullmatch(keras)]
        found = {layer for layer in (name.partition(".")[0] for name in state_dict) if numbered.fullmatch(layer)}
        # Of unequal length for another network, whose layers then differ by name.
        ours.update(zip(sorted(found, key=_number), shortcuts, strict=False))
    renamed = {}
    for name, tensor in state_dict.items():
        layer, _, last = name.partition(".")
        renamed[f"{ours.get(layer, layer)}.{last}".replace(".depthwise.", ".conv1.")] = tensor
    return renamed


def to_keras(state_dict):
    """The inverse of `from_keras`, with the numbers a fresh Keras gives; batch counters are left out."""
    renamed = {}
    for layer, keras in KERAS_LAYERS.items():
        for name, tensor in state_dict.items():
            last = name.removeprefix(layer + ".")
            if last != name and last != "num_batches_tracked":
                renamed[f"{keras}.{last}".replace(".conv1.", ".depthwise.")] = tensor
    return renamed


def _number(layer):
    """conv2d -> 0, conv2d_3 -> 3."""
    return int(layer.rpartition("_")[2]) if layer[-1].isdigit() and "_" in layer else 0
