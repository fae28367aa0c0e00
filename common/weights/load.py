"""Readers of checkpoint files: our own, torchvision's, timm's and Cadene's `.pth`, safetensors, MindSpore and Keras.

`read_checkpoint` returns a state dict in our names and the file's metadata; `load_model` builds the network that fits
and fills it strictly. Nothing is unpickled that could run code, and a damaged file is never half read.
"""

import dataclasses
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import UserError

LISTED_DIFFERENCES = 20


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint file holds.

    Attributes:
      state_dict: parameter name -> CPU tensor, in the names of our networks.
      build_options: arguments of ModelSpec.build that the file states or that its tensors give away.
      metadata: everything else the file says: "image_size", "classes", "epoch" and so on; never tensors.
      format: name of the format that was recognized.
    """

    state_dict: dict
    build_options: dict
    metadata: dict
    format: str


@dataclasses.dataclass(frozen=True)
class Reader:
    """One file format.

    Attributes:
      recognizes: (first 16 bytes, path) -> bool.
      read: (path, spec) -> Loaded whose state dict is already in our names.
    """

    recognizes: Callable[[bytes, pathlib.Path], bool]
    read: Callable[[pathlib.Path, Any], Loaded]


def read_checkpoint(path, spec):
    """Read a checkpoint of any known format.

    Args:
      path: the file.
      spec: ModelSpec of the network it should fit.
    Returns:
      Loaded; where the file holds averaged (EMA) weights beside the raw ones, the averaged ones.
    Raises:
      UserError: missing, damaged, of an unknown format, or made for another network.
    """
    path = pathlib.Path(path)
    try:
        head = _head(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a checkpoint file") from error
    for reader in READERS:
        if reader.recognizes(head, path):
            return _with_inferred_options(reader.read(path, spec), spec)
    raise UserError(
        f"{path}: not a checkpoint format known here; expected .pth, .pth.tar, .pt, .safetensors, "
        "MindSpore's .ckpt or Keras' .h5"
    )


def load_model(path, spec, **explicit):
    """Build the network that a checkpoint was made for and fill it.

    Args:
      path: checkpoint file.
      spec: ModelSpec.
      explicit: build options the user asked for by flag; None means not asked for.
    Returns:
      (model, meta): the nn.Module in evaluation mode on the CPU; a dict with "format", "path", "build" (the options it
      was built with), "num_classes", "image_size" and whatever else the file states.
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
            drop_background(state_dict, spec)
        elif stored != value and (found.format == "zoo" or name not in spec.infer_options(state_dict)):
            raise UserError(f"--{name.replace('_', '-')}: {value}, but {path} holds {stored}")
        options[name] = value
    unknown = sorted(set(options) - set(spec.build_options))
    if unknown:
        raise UserError(f"{path}: was built with {', '.join(unknown)}, which {spec.name} does not have")
    model = spec.build(**options)
    fill(model, state_dict, path, spec.name)
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


def load_pretrained(path, spec, options, explicit):
    """Weights to start a training with; what the file cannot give is initialized anew, and said.

    That is a classifier of another class count, and the modules of `spec.training_modules` where the file has none.

    Args:
      path: checkpoint file.
      spec: ModelSpec.
      options: build options of the training.
      explicit: names of those that the user gave; the file decides the others, class count and training modules apart.
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
        drop_background(state_dict, spec)
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
    check_fits(own, state_dict, path, spec.name)
    return options, {key: state_dict.get(key, value) for key, value in own.items()}


def drop_background(state_dict, spec):
    """Cut the background rows off the classifiers of a state dict, in place."""
    for layer in spec.classifiers:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in state_dict:
                state_dict[name] = state_dict[name][spec.label_offset :].clone()


def fill(model, state_dict, path, name):
    """Copy a state dict into a network; every name and shape must agree.

    The batch counters of batch norm (`num_batches_tracked`) may be absent: files older than torch 0.4.1 have none.

    Raises:
      UserError: lists what differs, sorted by name.
    """
    check_fits(model.state_dict(), state_dict, path, name)
    model.load_state_dict(dict(state_dict))  # a plain dict has no version tag, so torch fills absent batch counters


def check_fits(own, state_dict, path, name):
    """Raise UserError with the sorted differences in names and shapes between two state dicts; batch counters may be
    absent from the second."""
    own = {key: tuple(tensor.shape) for key, tensor in own.items()}
    given = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    differences = []
    for key in sorted(own.keys() | given.keys()):
        if key not in given:
            if not key.endswith(".num_batches_tracked"):
                differences.append(f"missing {key} {list(own[key])}")
        elif key not in own:
            differences.append(f"unexpected {key} {list(given[key])}")
        elif own[key] != given[key]:
            differences.append(f"{key} is {list(given[key])}, not {list(own[key])}")
    if differences:
        shown = "; ".join(differences[:LISTED_DIFFERENCES])
        more = f"; and {len(differences) - LISTED_DIFFERENCES} more" if len(differences) > LISTED_DIFFERENCES else ""
        raise UserError(f"{path}: does not fit {name}, {len(differences)} names or shapes differ: {shown}{more}")


def _with_inferred_options(loaded, spec):
    """Add what a file without build options gives away by its tensors."""
    inferred = spec.infer_options(loaded.state_dict)
    weight = loaded.state_dict.get(spec.classifiers[0] + ".weight")
    if weight is not None:
        inferred = {**inferred, "num_classes": weight.shape[0]}
    return dataclasses.replace(loaded, build_options={**inferred, **loaded.build_options})


def _without_wrapper(state_dict):
    """Names without the `module.` that DataParallel and DistributedDataParallel put in front of all of them."""
    if state_dict and all(key.startswith("module.") for key in state_dict):
        return {key[len("module.") :]: tensor for key, tensor in state_dict.items()}
    return dict(state_dict)


def load_torch(path):
    """The content of a torch file: tensors and plain containers only; the CRC of every record is checked first.

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
    except (zipfile.BadZipFile, EOFError, RuntimeError, KeyError, IndexError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: truncated or damaged ({_first_line(error)}); copy or download it again") from error


def _head(path):
    with open(path, "rb") as file:
        return file.read(16)


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _read_torch(path, spec):
    content = load_torch(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict or a dict with 'state_dict'")
    if "state_dict" in content:
        return _read_own(path, spec, content)
    return _bare(path, spec, content, {})


def _read_own(path, spec, content):
    """A dict with 'state_dict' and facts beside it: ours when it also has 'build', else a trainer's of other origin."""
    ours = "build" in content
    if ours and content.get("arch", spec.name) != spec.name:
        raise UserError(f"{path}: holds a {content['arch']}, this program is for {spec.name}")
    averaged = content.get("ema_state_dict")
    state_dict = content["state_dict"] if averaged is None else averaged
    metadata = {key: value for key, value in content.items() if _is_plain(value) and key != "build"}
    metadata["weights"] = "raw" if averaged is None else "ema"
    if not ours:
        return _bare(path, spec, state_dict, metadata)
    options = dict(content["build"])
    if content.get("num_classes") is not None:
        options.setdefault("num_classes", content["num_classes"])
    return Loaded(_without_wrapper(state_dict), options, metadata, "zoo")


def _is_plain(value):
    """Facts worth passing on: numbers, words and lists of words, not the optimizer's tensors."""
    if isinstance(value, list | tuple):
        return all(isinstance(item, str | int | float) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _bare(path, spec, state_dict, metadata):
    """Tensors without a word about where they come from; the names tell whose they are."""
    import torch

    state_dict = _without_wrapper(state_dict)
    foreign = sorted(key for key, value in state_dict.items() if not isinstance(value, torch.Tensor))
    if foreign or not state_dict:
        raise UserError(f"{path}: not a state dict ({', '.join(map(str, foreign[:5])) or 'empty'} is no tensor)")
    if "state_dict" in spec.key_maps:
        state_dict = spec.key_maps["state_dict"](state_dict)
    return Loaded(state_dict, dict(spec.format_options.get("state_dict", {})), metadata, "state_dict")


def _read_safetensors(path, spec):
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
        raise UserError(f"{path}: truncated or damaged ({_first_line(error)}); copy or download it again") from error
    loaded = _bare(path, spec, state_dict, dict(header.get("__metadata__") or {}))
    return dataclasses.replace(loaded, format="safetensors")


def _read_mindspore(path, spec):
    from common.weights import mindspore

    return _foreign(path, spec, "mindspore", mindspore.read)


def _read_keras(path, spec):
    from common.weights import keras

    return _foreign(path, spec, "keras", keras.read)


def _foreign(path, spec, name, read_tensors):
    """The weights of another framework, for a network whose spec knows the names there."""
    if name not in spec.key_maps:
        raise UserError(
            f"{path}: a {name} file, which {spec.name} cannot read; it reads .pth, .safetensors"
            f"{''.join(f', {known}' for known in spec.key_maps if known != 'state_dict')}"
        )
    state_dict = spec.key_maps[name](read_tensors(path))
    return Loaded(state_dict, dict(spec.format_options.get(name, {})), {}, name)


READERS = (
    Reader(lambda head, path: head.startswith(b"\x89HDF\r\n\x1a\n"), _read_keras),
    # the first field of a protobuf message; our own runs may write .ckpt files too, but those are zip archives
    Reader(lambda head, path: head.startswith(b"\x0a") and path.suffix == ".ckpt", _read_mindspore),
    Reader(lambda head, path: head[8:9] == b"{" or path.suffix == ".safetensors", _read_safetensors),
    # a zip archive, or the protocol-2 pickle that torch wrote before version 1.6
    Reader(lambda head, path: head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")), _read_torch),
)


def download(spec, folder=None):
    """Fetch the public weights of a network once; the hash in the file's name must be that of its bytes.

    Args:
      spec: ModelSpec with `weight_urls`, tried in order.
      folder: where to keep the file; default torch.hub's own folder for checkpoints.
    Returns:
      pathlib.Path of the complete file.
    Raises:
      UserError: no address answers, or a file is not the expected one; says where to get it by hand.
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
    hash_prefix = re.search(r"-([0-9a-f]{8,})\.", name).group(1)
    failures = []
    for url in spec.weight_urls:
        try:
            torch.hub.download_url_to_file(url, str(target), hash_prefix=hash_prefix, progress=False)
            return target
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors, a wrong hash is a RuntimeError
            failures.append(f"{url} ({_first_line(error)})")
    raise UserError(
        f"--ckpt: not given, and the public file could not be downloaded: {'; '.join(failures)}; "
        f"download {name} on another machine and pass it with --ckpt, or put it at {target}"
    )
