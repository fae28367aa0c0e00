"""Parameter names of Xception in the files of timm, Cadene, MindSpore and Keras, and here.

common/weights/{mindspore,keras}.py have already given the tensors torch's shapes and torch's names within a layer.
"""

import re
import typing

from common.spec import HALF_RANGE, IMAGENET, StateDict

if typing.TYPE_CHECKING:
    import torch


def _keras_layers() -> dict[str, str]:
    """Our layer name -> the one in keras.applications.Xception, in the order of Keras' files."""
    layers = {"conv1": "block1_conv1", "bn1": "block1_conv1_bn", "conv2": "block1_conv2", "bn2": "block1_conv2_bn"}
    shortcuts = 0
    for block in range(1, 13):
        for i in range(3 if 4 <= block <= 11 else 2):
            position, keras = 3 * i + (block > 1), f"block{block + 1}_sepconv{i + 1}"
            layers[f"block{block}.rep.{position}"], layers[f"block{block}.rep.{position + 1}"] = keras, keras + "_bn"
        if block in (1, 2, 3, 12):  # Keras numbers the shortcuts, which have no names
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


def from_torch(state_dict: StateDict) -> StateDict:
    """Cadene's and timm's files: the classifier may be `last_linear`, old files hold pointwise kernels as matrices."""
    ours = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"^last_linear\.", "fc.", name)
        if name.endswith(".pointwise.weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        ours[name] = tensor
    return ours


def from_mindspore(state_dict: StateDict) -> StateDict:
    """Official model zoo: our names. mindcv: `classifier`, and blocks may be a list that counts from 0.

    mindcv normalizes images with ImageNet's mean and standard deviation (its `config.py`).
    """

    def ours(name: str) -> str:
        name = re.sub(r"^classifier\.", "fc.", name)
        return re.sub(r"^blocks\.(\d+)\.", lambda match: f"block{int(match[1]) + 1}.", name)

    renamed = {ours(name): tensor for name, tensor in state_dict.items()}
    if renamed.keys() == state_dict.keys():
        return renamed
    from common.weights.folding import fold_input

    return fold_input(renamed, "conv1", "bn1", IMAGENET, HALF_RANGE)


def from_keras(state_dict: StateDict) -> StateDict:
    """keras.applications: other layer names; the numbers of the shortcuts depend on what Keras built before."""
    from common.weights import keras

    renamed = keras.rename(state_dict, list(KERAS_LAYERS.items()))
    return {name.replace(".depthwise.", ".conv1."): tensor for name, tensor in renamed.items()}


def to_keras(state_dict: StateDict) -> StateDict:
    """The inverse of `from_keras`, with the numbers that a new Keras process gives; batch counters are left out."""
    renamed: dict[str, torch.Tensor] = {}
    for layer, keras in KERAS_LAYERS.items():
        for name, tensor in state_dict.items():
            last = name.removeprefix(layer + ".")
            if last != name and last != "num_batches_tracked":
                renamed[f"{keras}.{last}".replace(".conv1.", ".depthwise.")] = tensor
    return renamed


def same_at(option: str, image_size: int) -> bool:
    """Whether networks that differ in a build option alone are the same function for square images of this size.

    The two pooling phases differ where a pool has an even input side: not at 295 and 296 pixels.
    """
    if option != "pool_padding":
        return False
    side = (image_size - 3) // 2 - 1  # after conv2; the pools of blocks 1, 2, 3 and 12 halve it, rounding up
    for _ in range(4):
        if side % 2 == 0:
            return False
        side = (side + 1) // 2
    return True
