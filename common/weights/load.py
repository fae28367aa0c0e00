"""Readers of checkpoints: our own, torchvision's, timm's and Cadene's `.pth`, safetensors, MindSpore, Keras.

Torch is imported when it is needed. Nothing is unpickled that could run code, and a damaged file is an error.
"""

import dataclasses
import json
import pathlib
import pickle
import re
import typing
import zipfile
from collections.abc import Callable, Mapping, Set
from typing import Any

from common.errors import UserError
from common.files import StrPath
from common.spec import BuildOptions, ModelSpec, StateDict

if typing.TYPE_CHECKING:
    import torch

MAX_LISTED_DIFFERENCES = 20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
      state_dict: CPU tensors in the names of our networks; the averaged (EMA) weights where the file has both.
      build_options: arguments of ModelSpec.build that the file states or that its tensors imply.
      metadata: other plain values: "image_size", "classes", "epoch" and so on.
      format: "zoo" (our own), "state_dict", "safetensors", "mindspore" or "keras".
    """

    state_dict: StateDict
    build_options: BuildOptions
    metadata: Mapping[str, Any]
    format: str


def read_checkpoint(path: StrPath, spec: ModelSpec) -> Checkpoint:
    """Read a checkpoint of any known format.

    Raises:
      UserError: missing, damaged, of an unknown format, or made for another network.
    """
    path = pathlib.Path(path)
    try:
        head = _head(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a checkpoint file") from error
    checkpoint = _reader(head, path)(path, spec)
    return dataclasses.replace(
        checkpoint, build_options={**_implied_options(checkpoint.state_dict, spec), **checkpoint.build_options}
    )


def load_model(path: StrPath, spec: ModelSpec, **explicit: Any) -> "tuple[torch.nn.Module, dict[str, Any]]":
    """Build the network that a checkpoint was made for and load its weights.

    Args:
      path: checkpoint file.
      spec: the network.
      explicit: build options that the user gave; None: not given.
    Returns:
      (model in evaluation mode on the CPU, meta). meta holds "format", "path", "build" (the options of the model),
      "num_classes", "image_size" and the metadata of the file.
    Raises:
      UserError: see `read_checkpoint`; an explicit option that contradicts the file; names or shapes that differ.
    """
    found = read_checkpoint(path, spec)
    state_dict, options = dict(found.state_dict), dict(found.build_options)
    for name, value in explicit.items():
        if value is None:
            continue
        stored = options.get(name, value)
        if name == "num_classes" and stored != value == stored - spec.background_columns(stored):
            state_dict = without_background(state_dict, spec)
        elif stored != value and (found.format == "zoo" or name not in spec.infer_options(state_dict)):
            raise UserError(f"--{name.replace('_', '-')}: {value}, but {path} holds {stored}")
        options[name] = value
    unknown = sorted(set(options) - set(spec.build_options))
    if unknown:
        raise UserError(f"{path}: was built with {', '.join(unknown)}, which {spec.name} does not have")
    model = spec.build(**options)
    check_state_dict(model.state_dict(), state_dict, path, spec.name)
    model.load_state_dict(state_dict)  # a plain dict has no version tag, so torch accepts absent batch counters
    meta = {
        "image_size": spec.input_size,
        "classes": None,
        **found.metadata,
        "format": found.format,
        "path": str(path),
        "build": {**spec.build_options, **options},
    }
    meta["num_classes"] = meta["build"]["num_classes"]
    return model.eval(), meta


def load_pretrained(
    path: StrPath, spec: ModelSpec, options: BuildOptions, explicit: Set[str]
) -> tuple[BuildOptions, StateDict]:
    """Weights to start a training with.

    A classifier with another class count, and `spec.training_modules` that the file lacks, are initialized.

    Args:
      path: checkpoint file.
      spec: the network.
      options: build options of the training.
      explicit: names of those that the user gave. The file decides the others, except the class count and "aux".
    Returns:
      (build options, complete state dict).
    Raises:
      UserError: see `read_checkpoint`; names or shapes that differ elsewhere.
    """
    found = read_checkpoint(path, spec)
    kept = {"num_classes", "aux", *explicit}
    options = {**options, **{name: value for name, value in found.build_options.items() if name not in kept}}
    state_dict, own = dict(found.state_dict), spec.build(**options).state_dict()
    if found.build_options.get("num_classes") == options["num_classes"] + spec.label_offset:
        state_dict = without_background(state_dict, spec)
    for layer in spec.classifiers:
        name = f"{layer}.weight"
        if name in state_dict and name in own and state_dict[name].shape[0] != own[name].shape[0]:
            print(
                f"--pretrained: {layer} has {state_dict[name].shape[0]} classes, not {own[name].shape[0]}; "
                "initialized anew"
            )
            state_dict.update({f"{layer}.{part}": own[f"{layer}.{part}"] for part in ("weight", "bias")})
    for module in spec.training_modules:
        if not any(key.startswith(f"{module}.") for key in state_dict):
            state_dict.update({key: value for key, value in own.items() if key.startswith(f"{module}.")})
        if not any(key.startswith(f"{module}.") for key in own):
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(f"{module}.")}
    check_state_dict(own, state_dict, path, spec.name)
    return options, {key: state_dict.get(key, value) for key, value in own.items()}


def without_background(state_dict: StateDict, spec: ModelSpec) -> "dict[str, torch.Tensor]":
    """A state dict without the background rows of its classifiers."""
    rows = {f"{layer}.{part}" for layer in spec.classifiers for part in ("weight", "bias")}
    return {key: value[spec.label_offset :].clone() if key in rows else value for key, value in state_dict.items()}


def check_state_dict(own: StateDict, given: StateDict, path: StrPath, name: str) -> None:
    """Compare the names and shapes of a file with those of a network.

    The batch counters of batch norm (`num_batches_tracked`) may be absent: files older than torch 0.4.1 have none.

    Raises:
      UserError: the differences, sorted by name.
    """
    shapes = {key: list(tensor.shape) for key, tensor in own.items()}
    found = {key: list(tensor.shape) for key, tensor in given.items()}
    differences = []
    for key in sorted(shapes.keys() | found.keys()):
        if key not in found:
            if not key.endswith(".num_batches_tracked"):
                differences.append(f"missing {key} {shapes[key]}")
        elif key not in shapes:
            differences.append(f"unexpected {key} {found[key]}")
        elif shapes[key] != found[key]:
            differences.append(f"{key} is {found[key]}, not {shapes[key]}")
    if differences:
        listed, more = differences[:MAX_LISTED_DIFFERENCES], len(differences) - MAX_LISTED_DIFFERENCES
        text = "; ".join([*listed, f"and {more} more"] if more > 0 else listed)
        raise UserError(f"{path}: does not fit {name}, {len(differences)} names or shapes differ: {text}")


def _implied_options(state_dict: StateDict, spec: ModelSpec) -> BuildOptions:
    """Build options that the tensors of a file imply."""
    weight = state_dict.get(spec.classifiers[0] + ".weight")
    num_classes = {} if weight is None else {"num_classes": weight.shape[0]}
    return {**spec.infer_options(state_dict), **num_classes}


def _without_wrapper(state_dict: StateDict) -> StateDict:
    """Names without the `module.` that DataParallel and DistributedDataParallel put in front of all of them."""
    if state_dict and all(key.startswith("module.") for key in state_dict):
        return {key[len("module.") :]: tensor for key, tensor in state_dict.items()}
    return dict(state_dict)


def load_torch(path: StrPath) -> Any:
    """torch.load of tensors and plain containers only; the CRC of every record is checked first.

    Raises:
      UserError: truncated, damaged, or holding anything else.
    """
    import torch

    try:
        if _head(path).startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise UserError(f"{path}: damaged, the checksum of {broken} is wrong; copy or download it again")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: damaged, or holds objects that only its own program can load; save its state_dict "
            f"alone ({_first_line(error)})"
        ) from error
    except UserError:
        raise
    except (zipfile.BadZipFile, EOFError, RuntimeError, KeyError, IndexError, ValueError, OSError) as error:
        raise _damaged(path, error) from error


def _head(path: StrPath) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _damaged(path: StrPath, error: Exception) -> UserError:
    return UserError(f"{path}: truncated or damaged ({_first_line(error)}); copy or download it again")


def _read_torch(path: pathlib.Path, spec: ModelSpec) -> Checkpoint:
    content = load_torch(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict or a dict with 'state_dict'")
    if "state_dict" not in content:
        return _from_state_dict(path, spec, content, {})
    is_ours = "build" in content  # else a checkpoint of another trainer
    if is_ours and content.get("arch", spec.name) != spec.name:
        raise UserError(f"{path}: holds a {content['arch']}, this program is for {spec.name}")
    averaged = content.get("ema_state_dict")
    state_dict = content["state_dict"] if averaged is None else averaged
    metadata = {key: value for key, value in content.items() if _is_plain(value) and key != "build"}
    metadata["weights"] = "raw" if averaged is None else "ema"
    if not is_ours:
        return _from_state_dict(path, spec, state_dict, metadata)
    options = dict(content["build"])
    if content.get("num_classes") is not None:
        options.setdefault("num_classes", content["num_classes"])
    return Checkpoint(_without_wrapper(state_dict), options, metadata, "zoo")


def _is_plain(value: object) -> bool:
    """Numbers, strings and lists of them, not the optimizer's tensors."""
    if isinstance(value, list | tuple):
        return all(isinstance(item, str | int | float) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _from_state_dict(
    path: pathlib.Path, spec: ModelSpec, state_dict: Mapping[str, Any], metadata: Mapping[str, Any]
) -> Checkpoint:
    """Tensors of unknown origin; the key map of the spec recognizes the names."""
    import torch

    state_dict = _without_wrapper(state_dict)
    foreign = sorted(key for key, value in state_dict.items() if not isinstance(value, torch.Tensor))
    if foreign or not state_dict:
        raise UserError(f"{path}: not a state dict ({', '.join(map(str, foreign[:5])) or 'empty'} is no tensor)")
    if "state_dict" in spec.key_maps:
        state_dict = spec.key_maps["state_dict"](state_dict)
    return Checkpoint(state_dict, dict(spec.format_options.get("state_dict", {})), metadata, "state_dict")


def _read_safetensors(path: pathlib.Path, spec: ModelSpec) -> Checkpoint:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: reading it needs the safetensors package; pip install safetensors") from error
    try:
        state_dict = load_file(path, device="cpu")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, ValueError, OSError) as error:
        raise _damaged(path, error) from error
    checkpoint = _from_state_dict(path, spec, state_dict, dict(header.get("__metadata__") or {}))
    return dataclasses.replace(checkpoint, format="safetensors")


def _read_mindspore(path: pathlib.Path, spec: ModelSpec) -> Checkpoint:
    from common.weights import mindspore

    return _read_foreign(path, spec, "mindspore", mindspore.read)


def _read_keras(path: pathlib.Path, spec: ModelSpec) -> Checkpoint:
    from common.weights import keras

    return _read_foreign(path, spec, "keras", keras.read)


def _read_foreign(
    path: pathlib.Path, spec: ModelSpec, name: str, read: Callable[[pathlib.Path], StateDict]
) -> Checkpoint:
    """Weights of another framework, for a network whose spec has a key map for it."""
    if name not in spec.key_maps:
        raise UserError(
            f"{path}: a {name} file, which {spec.name} cannot read; it reads .pth, .safetensors"
            f"{''.join(f', {known}' for known in spec.key_maps if known != 'state_dict')}"
        )
    return Checkpoint(spec.key_maps[name](read(path)), dict(spec.format_options.get(name, {})), {}, name)


def _reader(head: bytes, path: pathlib.Path) -> Callable[[pathlib.Path, ModelSpec], Checkpoint]:
    """The reader for a file, from its first 16 bytes."""
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _read_keras
    # The first field of a protobuf message. Our own runs write .ckpt files too, but those are zip archives.
    if head.startswith(b"\x0a") and path.suffix == ".ckpt":
        return _read_mindspore
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors
    # A zip archive, or the pickle that torch wrote before version 1.6.
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return _read_torch
    raise UserError(
        f"{path}: not a checkpoint format known here; expected .pth, .pth.tar, .pt, .safetensors, "
        "MindSpore's .ckpt or Keras' .h5"
    )


def download(spec: ModelSpec, folder: StrPath | None = None) -> pathlib.Path:
    """Download the public weights of a network once; their hash must be the one in the file name.

    Args:
      spec: the network, with `weight_urls`.
      folder: where to keep the file; default torch.hub's folder for checkpoints.
    Raises:
      UserError: no address answers, or the file is another one; says where to put a file downloaded by hand.
    """
    import torch

    if not spec.weight_urls:
        raise UserError(f"--ckpt: no public weights are known for {spec.name}; give a checkpoint file")
    folder = pathlib.Path(folder or pathlib.Path(torch.hub.get_dir()) / "checkpoints")
    name = spec.weight_urls[0].rpartition("/")[2]
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    assert match, f"{name} carries no hash"
    failures = []
    for url in spec.weight_urls:
        try:
            torch.hub.download_url_to_file(url, str(target), hash_prefix=match[1], progress=False)
            return target
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors, a wrong hash is a RuntimeError
            failures.append(f"{url} ({_first_line(error)})")
    raise UserError(
        f"--ckpt: not given, and the public file could not be downloaded: {'; '.join(failures)}; "
        f"download {name} on another machine and pass it with --ckpt, or put it at {target}"
    )
