"""Xception's layers in the weight files of the world: which name is which, in both directions.

Layers have torch's shapes and torch's last names here (common/mindspore_ckpt.py and common/keras_h5.py see to that).
"""
import re


def _keras_layers():
    """Our layer name -> the one of keras.applications.Xception; the four shortcuts have numbers instead of names."""
    layers = {"conv1": "block1_conv1", "bn1": "block1_conv1_bn", "conv2": "block1_conv2", "bn2": "block1_conv2_bn",
              "conv3": "block14_sepconv1", "bn3": "block14_sepconv1_bn",
              "conv4": "block14_sepconv2", "bn4": "block14_sepconv2_bn", "fc": "predictions"}
    for block in range(1, 13):
        first, count = (0, 2) if block == 1 else (1, 2) if block in (2, 3, 12) else (1, 3)
        for i in range(count):
            keras = f"block{block + 1}_sepconv{i + 1}"
            layers[f"block{block}.rep.{first + 3 * i}"] = keras
            layers[f"block{block}.rep.{first + 3 * i + 1}"] = keras + "_bn"
    return layers


KERAS_LAYERS = _keras_layers()
SHORTCUTS = ("block1", "block2", "block3", "block12")  # in Keras' order


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
    """keras.applications: names of layers differ, and shortcut layers are known by their order of creation."""
    layers = {keras: layer for layer, keras in KERAS_LAYERS.items()}
    unnamed = {layer for layer in (name.partition(".")[0] for name in state_dict) if layer not in layers}
    for kind, ours in (("conv", "skip"), ("batch", "skipbn")):
        numbered = sorted((layer for layer in unnamed if layer.startswith(kind)), key=_number)
        layers.update(zip(numbered, (f"{block}.{ours}" for block in SHORTCUTS), strict=False))
    return {_with_layer(name, layers).replace(".depthwise.", ".conv1."): tensor
            for name, tensor in state_dict.items()}


def to_keras(state_dict):
    """The inverse of `from_keras`, with the numbers a fresh Keras gives; batch counters are left out."""
    theirs = dict(KERAS_LAYERS)
    for i, block in enumerate(SHORTCUTS):
        number = f"_{i}" if i else ""
        theirs[f"{block}.skip"], theirs[f"{block}.skipbn"] = f"conv2d{number}", f"batch_normalization{number}"
    renamed = {}
    for name, tensor in state_dict.items():
        if name.endswith(".num_batches_tracked"):
            continue
        layer = max((layer for layer in theirs if name.startswith(layer + ".")), key=len)
        renamed[theirs[layer] + name[len(layer):].replace(".conv1.", ".depthwise.")] = tensor
    return renamed


def _number(layer):
    """conv2d -> 0, conv2d_3 -> 3."""
    found = re.search(r"_(\d+)$", layer)
    return int(found[1]) if found else 0


def _with_layer(name, layers):
    layer, _, last = name.partition(".")
    return f"{layers.get(layer, layer)}.{last}"
