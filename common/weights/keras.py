"""Keras' `.h5` weight files, read and written with h5py, without Keras.

The layout is that of `save_weights("x.h5")`, and below `model_weights` that of `model.save("x.h5")`: one group per
layer, whose attribute `weight_names` lists its arrays in Keras' order; the attribute `layer_names` lists the layers.
The names of arrays changed between versions of Keras; order and rank tell them apart.

    layer                   arrays                                        tensors
    convolution             kernel [H, W, I, O]                           LAYER.weight [O, I, H, W]
    separable convolution   depthwise_kernel [H, W, C, 1],                LAYER.depthwise.weight [C, 1, H, W],
                            pointwise_kernel [1, 1, C, O]                 LAYER.pointwise.weight [O, C, 1, 1]
    batch norm              (gamma,) beta, moving_mean, moving_variance   LAYER.weight, LAYER.bias,
                                                                          LAYER.running_mean, LAYER.running_var
    dense                   kernel [I, O], bias                           LAYER.weight [O, I], LAYER.bias
"""

from collections.abc import Iterable
from typing import Any

import torch

from common.errors import UserError
from common.files import StrPath
from common.spec import StateDict

_NORM = ("weight", "bias", "running_mean", "running_var")
_NORM_KERAS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}

Tensors = dict[str, torch.Tensor]


def read(path: StrPath) -> Tensors:
    """Read a Keras weight file: CPU tensors under the names of the table above.

    Raises:
      UserError: damaged, not written by Keras, or with a layer of another kind.
    """
    h5py = _h5py(path)
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            if "layer_names" not in root.attrs:
                raise UserError(
                    f"{path}: an HDF5 file without Keras' layer_names; write it with model.save('x.h5') "
                    "(not as .weights.h5, where layers have no names)"
                )
            return {
                f"{layer}.{name}": tensor
                for layer in _decoded(root.attrs["layer_names"])
                for name, tensor in _read_layer(path, layer, root[layer]).items()
            }
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: truncated or damaged ({error}); copy or download it again") from error


def write(path: StrPath, state_dict: StateDict) -> None:
    """Write tensors under the names of the table above in the layout of Keras' save_weights."""
    h5py = _h5py(path)
    layers: dict[str, Tensors] = {}
    for name, tensor in state_dict.items():
        layer, _, last = name.partition(".")
        layers.setdefault(layer, {})[last] = tensor.detach().cpu()
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.4.0"
        for layer, tensors in layers.items():
            group, arrays = file.create_group(layer), _keras_arrays(tensors)
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in arrays]
            for name, array in arrays.items():
                group[f"{layer}/{name}:0"] = array.contiguous().numpy()


def _read_layer(path: StrPath, layer: str, group: Any) -> Tensors:
    """The tensors of one layer."""
    arrays = [torch.from_numpy(group[name][()]) for name in _decoded(group.attrs["weight_names"])]
    ranks = [array.ndim for array in arrays]
    if not arrays:
        return {}
    if ranks == [4]:
        return {"weight": _from_hwio(arrays[0])}
    if ranks == [4, 4]:
        return {
            "depthwise.weight": arrays[0].permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1).contiguous(),
            "pointwise.weight": _from_hwio(arrays[1]),
        }
    if ranks == [2, 1]:
        return {"weight": arrays[0].T.contiguous(), "bias": arrays[1]}
    if ranks in ([1] * 3, [1] * 4):
        return dict(zip(_NORM[-len(ranks) :], arrays, strict=True))
    raise UserError(
        f"{path}: layer {layer} has arrays {[list(array.shape) for array in arrays]}, which is no "
        "convolution without bias, batch norm or dense layer"
    )


def _keras_arrays(tensors: Tensors) -> Tensors:
    """Arrays of one layer under Keras' names and in Keras' order."""
    if "depthwise.weight" in tensors:
        return {
            "depthwise_kernel": tensors["depthwise.weight"].permute(2, 3, 0, 1),
            "pointwise_kernel": _to_hwio(tensors["pointwise.weight"]),
        }
    if "running_mean" in tensors:
        return {_NORM_KERAS[name]: tensors[name] for name in _NORM if name in tensors}
    if tensors["weight"].ndim == 4:
        return {"kernel": _to_hwio(tensors["weight"])}
    return {"kernel": tensors["weight"].T, "bias": tensors["bias"]}


def _from_hwio(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(3, 2, 0, 1).contiguous()


def _to_hwio(weight: torch.Tensor) -> torch.Tensor:
    return weight.permute(2, 3, 1, 0)


def _decoded(names: Iterable[bytes | str]) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _h5py(path: StrPath) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: Keras files need the h5py package; pip install h5py") from error
    return h5py
