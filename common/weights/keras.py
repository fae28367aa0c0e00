"""Keras' weight files, read and written with h5py, without Keras.

`.h5`: the layout of `save_weights("x.h5")`, and below `model_weights` that of `model.save("x.h5")`: one group per
layer, whose attribute `weight_names` lists its arrays in Keras' order; the attribute `layer_names` lists the layers.
The names of arrays changed between versions of Keras; order and rank tell them apart. A network within another model
(`Sequential([base, GlobalAveragePooling2D(), Dense(5)])`) is one group, whose names LAYER/ARRAY tell its layers apart.

`.weights.h5`, also within a `.keras` archive: arrays `layers/KIND_n/vars/i`, where n counts the layers of a class (in
Keras 2.12 by two, below `_layer_checkpoint_dependencies`). A network within another model is a layer that has `layers`.
Keras 3 adds the layer's name as an attribute of `vars`, the archive has it in config.json; without a name the k-th
layer is read as `@KIND@k` (see `rename`).

    layer                   arrays                                        tensors
    convolution             kernel [H, W, I, O]                           LAYER.weight [O, I, H, W]
    separable convolution   depthwise_kernel [H, W, C, 1],                LAYER.depthwise.weight [C, 1, H, W],
                            pointwise_kernel [1, 1, C, O]                 LAYER.pointwise.weight [O, C, 1, 1]
    batch norm              (gamma,) beta, moving_mean, moving_variance   LAYER.weight, LAYER.bias,
                                                                          LAYER.running_mean, LAYER.running_var
    dense                   kernel [I, O], bias                           LAYER.weight [O, I], LAYER.bias
"""

import io
import json
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
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
        content, configs = _unpacked(path)
        with h5py.File(content, "r") as file:
            root = file.get("model_weights", file)
            if "layer_names" in root.attrs:
                layers = [
                    each for layer in _decoded(root.attrs["layer_names"]) for each in _named_layers(root[layer], layer)
                ]
            elif (below := _layers_of(root)) is not None:
                layers = list(_numbered_layers(below, configs))
            else:
                raise UserError(
                    f"{path}: an HDF5 file without Keras' layer_names or layers; write it with model.save('x.h5')"
                )
            return {
                f"{layer}.{name}": tensor
                for layer, arrays in layers
                for name, tensor in _read_layer(path, layer, arrays).items()
            }
    except (OSError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: truncated or damaged ({error}); copy or download it again") from error


def rename(state_dict: StateDict, layers: Sequence[tuple[str, str]]) -> StateDict:
    """Tensors of `read` under our names.

    Layers that Keras numbers in the order of building (conv2d, conv2d_1, ...) may start at any number. `@KIND@k` is the
    k-th layer of its kind in `layers`. The only dense layer of a file is the classifier, whatever its name.

    Args:
      layers: (our name, Keras' name in a new process), in the order of Keras' files.
    """
    ours = {keras: layer for layer, keras in layers}
    found = dict.fromkeys(name.partition(".")[0] for name in state_dict if not name.startswith("@"))
    for kind in ("conv2d", "batch_normalization"):
        numbered = re.compile(rf"{kind}(_\d+)?")
        standard = sorted((keras for keras in ours if numbered.fullmatch(keras)), key=_number)
        given = sorted((layer for layer in found if numbered.fullmatch(layer)), key=_number)
        # Another network has another number of them; its names then differ.
        ours.update(dict(zip(given, [ours[keras] for keras in standard], strict=False)))
    dense = {name.partition(".bias")[0] for name, tensor in state_dict.items() if name.endswith(".bias")} & {
        name.partition(".weight")[0] for name, tensor in state_dict.items() if tensor.ndim == 2
    }
    if len(dense) == 1:
        ours[dense.pop()] = layers[-1][0]
    kinds: dict[str, list[str]] = {}
    for layer, keras in layers[:-1]:
        kinds.setdefault(_kind(keras), []).append(layer)
    for kind, names in kinds.items():
        ours.update({f"@{kind}@{position}": layer for position, layer in enumerate(names)})
    renamed = {}
    for name, tensor in state_dict.items():
        layer, _, last = name.partition(".")
        renamed[f"{ours.get(layer, layer)}.{last}"] = tensor
    return renamed


def write(path: StrPath, state_dict: StateDict) -> None:
    """Write tensors under the names of the table above, in their order: the layout of `.weights.h5` for a path that
    ends so, else the one of `.h5`."""
    h5py = _h5py(path)
    layers: dict[str, Tensors] = {}
    for name, tensor in state_dict.items():
        layer, _, last = name.partition(".")
        layers.setdefault(layer, {})[last] = tensor.detach().cpu()
    if pathlib.Path(path).name.endswith(".weights.h5"):
        with h5py.File(path, "w") as file:
            file.create_group("vars")  # Keras 2 reads it
            counts: dict[str, int] = {}
            for layer, tensors in layers.items():
                kind = _kind(layer)
                count = counts.setdefault(kind, 0)
                counts[kind] += 1
                group = file.create_group(f"layers/{kind}{f'_{count}' if count else ''}/vars")
                group.attrs["name"] = layer
                for position, array in enumerate(_keras_arrays(tensors).values()):
                    group[str(position)] = array.contiguous().numpy()
        return
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.4.0"
        for layer, tensors in layers.items():
            group, arrays = file.create_group(layer), _keras_arrays(tensors)
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in arrays]
            for name, array in arrays.items():
                group[f"{layer}/{name}:0"] = array.contiguous().numpy()


def _unpacked(path: StrPath) -> tuple[Any, list[Any]]:
    """(what h5py opens, Keras' descriptions of the layers in the order of the network; none for a bare weight file)."""
    if not zipfile.is_zipfile(path):
        return path, []
    with zipfile.ZipFile(path) as archive:
        configs = json.loads(archive.read("config.json"))["config"].get("layers", [])
        return io.BytesIO(archive.read("model.weights.h5")), configs


def _named_layers(group: Any, layer: str) -> Iterator[tuple[str, list[Any]]]:
    """(name, arrays) of one layer, or of the layers of a network within a model."""
    names = _decoded(group.attrs["weight_names"])
    parents = [name.rpartition("/")[0].rpartition("/")[2] for name in names]
    inner = list(dict.fromkeys(parents))
    for one in inner:
        arrays = [group[name][()] for name, parent in zip(names, parents, strict=True) if parent == one]
        yield one if len(inner) > 1 else layer, arrays


def _layers_of(group: Any) -> Any:
    """The group of the layers of a model, or None for a layer."""
    return next((group[name] for name in ("layers", "_layer_checkpoint_dependencies") if name in group), None)


def _numbered_layers(group: Any, configs: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """(name, arrays) of the layers of a `.weights.h5` file that have arrays."""
    known: dict[str, list[Any]] = {}
    for config in configs:
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", config["class_name"]).lower().replace("conv2_d", "conv2d")
        known.setdefault(snake, []).append(config["config"])
    counts: dict[str, int] = {}
    for layer in sorted(group, key=_number):
        kind = re.sub(r"_\d+$", "", layer)
        position = counts[kind] = counts.get(kind, -1) + 1
        config = known[kind][position] if position < len(known.get(kind, ())) else {}
        below = _layers_of(group[layer])
        if below is not None:
            yield from _numbered_layers(below, config.get("layers", []))
            continue
        arrays = group[layer].get("vars", {})
        if len(arrays):
            name = config.get("name") or arrays.attrs.get("name", f"@{kind}@{position}")
            yield str(name), [arrays[key][()] for key in sorted(arrays, key=int)]


def _kind(layer: str) -> str:
    """Keras' class of a layer of keras.applications, in snake case, from its name."""
    if layer == "predictions":
        return "dense"
    if layer.endswith("_bn") or layer.startswith("batch_normalization"):
        return "batch_normalization"
    return "separable_conv2d" if "sepconv" in layer else "conv2d"


def _number(layer: str) -> int:
    """conv2d -> 0, conv2d_3 -> 3."""
    match = re.search(r"_(\d+)$", layer)
    return int(match[1]) if match else 0


def _read_layer(path: StrPath, layer: str, stored: Sequence[Any]) -> Tensors:
    """The tensors of one layer."""
    arrays = [torch.from_numpy(array) for array in stored]
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
