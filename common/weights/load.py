"""Readers of checkpoints: our own, torchvision's, timm's and Cadene's `.pth`, safetensors, MindSpore, Keras.

Torch is imported when it is needed. Nothing is unpickled that could run code, and a damaged file is an error.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import pathlib
import re
import typing
from collections.abc import Callable, Mapping, Set
from typing import Any

from common.errors import UserError, printable
from common.files import StrPath
from common.spec import BuildOptions, ModelSpec, StateDict
from common.weights.torch_file import (
    damaged,
    first_line,
    head,
    holds_keras,
    load_torch,
    refused,
    unknown_format,
)

if typing.TYPE_CHECKING:
    import torch

# Keys under which programs store weights and averages (EMA) of them: ours, timm's, torchvision's, PyTorch's tutorials'.
RAW_KEYS = ("state_dict", "model", "model_state_dict")
AVERAGED_KEYS = ("ema_state_dict", "state_dict_ema", "model_ema")

# Entry of a safetensors file's metadata: JSON of arch, build options, image size and class names.
SAFETENSORS_KEY = "zoo"
HUB_WEIGHTS = "model.safetensors"  # in a folder of the Hugging Face hub

# Build options that change no logits in evaluation mode.
TRAINING_ONLY = ("dropout", "aux")

# Parts of names that DataParallel, DistributedDataParallel, torch.compile, FSDP and activation checkpointing insert.
_INSERTED = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LISTED = 3  # differences of each kind that a message lists
_COMPARED = 20  # missing names that are compared with all unexpected ones


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
      state_dict: CPU tensors in the names of our networks.
      build_options: arguments of ModelSpec.build that the file states or that its tensors imply.
      metadata: other plain values: "image_size" (that of evaluation), "classes", "epoch", the "config" of our own runs
        and so on.
      format: "zoo" (our own), "state_dict", "safetensors", "mindspore" or "keras".
      taken: one line on the weights that were taken, where the file holds others too or names them in its own way.
    """

    state_dict: StateDict
    build_options: BuildOptions
    metadata: Mapping[str, Any]
    format: str
    taken: str = ""


def read_checkpoint(path: StrPath, spec: ModelSpec, use_ema: bool | None = None) -> Checkpoint:
    """Read a checkpoint of any known format.

    Args:
      use_ema: whether to take the averaged weights; None: where the file has them.
    Raises:
      UserError: missing, damaged, of an unknown format, or made for another network.
    """
    path = pathlib.Path(path)
    if (path / HUB_WEIGHTS).is_file():
        path /= HUB_WEIGHTS
    try:
        reader = _reader(head(path), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a checkpoint file") from error
    if reader is None:
        checkpoint = _read_torch(path, spec, use_ema)
    elif use_ema:
        raise UserError(f"--use-ema: {path} holds no averaged weights beside others; leave the option out")
    else:
        checkpoint = reader(path, spec)
    return dataclasses.replace(
        checkpoint, build_options={**_implied_options(checkpoint.state_dict, spec), **checkpoint.build_options}
    )


def load_model(
    path: StrPath, spec: ModelSpec, use_ema: bool | None = None, **explicit: Any
) -> "tuple[torch.nn.Module, dict[str, Any]]":
    """Build the network that a checkpoint was made for and load its weights.

    Args:
      path: checkpoint file.
      spec: the network.
      use_ema: see `read_checkpoint`.
      explicit: build options that the user gave; None: not given.
    Returns:
      (model in evaluation mode on the CPU, meta). meta holds "format", "taken" (see Checkpoint), "path", "build" (the
      options of the model), "num_classes", "image_size" and the metadata of the file.
    Raises:
      UserError: see `read_checkpoint`; an explicit option that contradicts the file; names or shapes that differ.
    """
    found = read_checkpoint(path, spec, use_ema)
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
    check_finite(state_dict, path)
    model.load_state_dict(state_dict)  # a plain dict has no version tag, so torch accepts absent batch counters
    meta = {
        "image_size": spec.input_size,
        "classes": None,
        **found.metadata,
        "format": found.format,
        "taken": found.taken,
        "path": str(path),
        "build": {**spec.build_options, **options},
    }
    meta["num_classes"] = meta["build"]["num_classes"]
    return model.eval(), meta


def load_pretrained(
    path: StrPath,
    spec: ModelSpec,
    options: BuildOptions,
    explicit: Set[str],
    use_ema: bool | None = None,
    seed: int = 0,
) -> tuple[BuildOptions, StateDict, list[str]]:
    """Weights to start a training with.

    A classifier with another class count, and `spec.training_modules` that the file lacks, are initialized: the
    classifier with weights of N(0, 0.01), small beside trained features, the modules as in a training from scratch.

    Args:
      path: checkpoint file.
      spec: the network.
      options: build options of the training.
      explicit: names of those that the user gave. The file decides the others, except the class count and "aux".
      use_ema: see `read_checkpoint`.
      seed: of the initialization.
    Returns:
      (build options, complete state dict, lines on what was taken and what was initialized).
    Raises:
      UserError: see `read_checkpoint`; names or shapes that differ elsewhere.
    """
    found = read_checkpoint(path, spec, use_ema)
    notes = [f"--pretrained: {found.taken}"] if found.taken else []
    kept = {"num_classes", "aux", *explicit}
    options = {**options, **{name: value for name, value in found.build_options.items() if name not in kept}}
    decided = explicit & found.build_options.keys() - {"num_classes", *TRAINING_ONLY, *spec.folds}
    for name in sorted(name for name in decided if options[name] != found.build_options[name]):
        notes.append(
            f"note: --{name.replace('_', '-')} {options[name]}: {path} holds weights of a network with "
            f"{found.build_options[name]}, whose logits differ"
        )
    state_dict, own = dict(found.state_dict), _initialized(spec, options, seed)
    stored = found.build_options.get("num_classes", 0)
    if options["num_classes"] == stored - spec.background_columns(stored) != stored:
        state_dict = without_background(state_dict, spec)
    has_classifier = f"{spec.classifiers[0]}.weight" in state_dict
    for layer in spec.classifiers:
        name = f"{layer}.weight"
        if name not in state_dict and name in own and layer == spec.classifiers[0]:
            notes.append(f"--pretrained: {layer} is not in the file; initialized anew")
            state_dict.update({f"{layer}.{part}": own[f"{layer}.{part}"] for part in ("weight", "bias")})
        elif name in state_dict and name in own and state_dict[name].shape[0] != own[name].shape[0]:
            notes.append(
                f"--pretrained: {layer} has {state_dict[name].shape[0]} classes, not {own[name].shape[0]}; "
                "initialized anew"
            )
            state_dict.update({f"{layer}.{part}": own[f"{layer}.{part}"] for part in ("weight", "bias")})
    other = [key for key in state_dict if key not in own and not key.startswith(spec.training_modules or "\0")]
    if not has_classifier and other:
        layers = ", ".join(dict.fromkeys(printable(key.rpartition(".")[0]) for key in other))
        notes.append(f"--pretrained: left out {layers[:160]}, which are no layers of {spec.name}")
        state_dict = {key: value for key, value in state_dict.items() if key not in other}
    for module in spec.training_modules:
        if not any(key.startswith(f"{module}.") for key in state_dict):
            new = {key: value for key, value in own.items() if key.startswith(f"{module}.")}
            state_dict.update(new)
            if new:
                notes.append(f"--pretrained: {module} is not in the file; initialized anew")
        if not any(key.startswith(f"{module}.") for key in own):
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(f"{module}.")}
    check_state_dict(own, state_dict, path, spec.name)
    check_finite(state_dict, path)
    return options, {key: state_dict.get(key, value) for key, value in own.items()}, notes


def _initialized(spec: ModelSpec, options: BuildOptions, seed: int) -> "dict[str, torch.Tensor]":
    """State dict of a new network whose classifiers are small."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = spec.build(**options).state_dict()
        for layer in spec.classifiers:
            if f"{layer}.weight" in own:
                torch.nn.init.normal_(own[f"{layer}.weight"], std=0.01)
                torch.nn.init.zeros_(own[f"{layer}.bias"])
    return own


def without_background(state_dict: StateDict, spec: ModelSpec) -> "dict[str, torch.Tensor]":
    """A state dict without the background rows of its classifiers."""
    rows = {f"{layer}.{part}" for layer in spec.classifiers for part in ("weight", "bias")}
    return {key: value[spec.label_offset :].clone() if key in rows else value for key, value in state_dict.items()}


class OtherWeights(UserError):
    """Names or shapes of a file are not those of a network; `count` of them differ."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


def check_state_dict(own: StateDict, given: StateDict, path: StrPath, name: str) -> None:
    """Compare the names and shapes of a file with those of a network.

    The batch counters of batch norm (`num_batches_tracked`) may be absent: files older than torch 0.4.1 have none.

    Raises:
      OtherWeights: how many names and shapes differ; shapes, and names beside the nearest ones, of the first few.
    """
    missing = sorted(key for key in own.keys() - given.keys() if not key.endswith(".num_batches_tracked"))
    unexpected = sorted(given.keys() - own.keys())
    reshaped = sorted(key for key in own.keys() & given.keys() if own[key].shape != given[key].shape)
    if not (missing or unexpected or reshaped):
        return
    counts = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    details = [f"{key} is {list(given[key].shape)}, not {list(own[key].shape)}" for key in reshaped[:_LISTED]]
    pairs = [(key, near[0]) for key in missing[:_COMPARED] if (near := difflib.get_close_matches(key, unexpected, 1))]
    for ours, theirs in pairs[:_LISTED]:
        details.append(f"nearest to our {_shown(ours, own)} is the file's {_shown(theirs, given)}")
    if not pairs:
        details += [f"missing {_shown(key, own)}" for key in missing[:_LISTED]]
        details += [f"unexpected {_shown(key, given)}" for key in unexpected[:_LISTED]]
    count = len(missing) + len(unexpected) + len(reshaped)
    raise OtherWeights(
        f"{path}: does not fit {name}, {count} names or shapes differ "
        f"({', '.join(f'{len(keys)} {word}' for word, keys in counts.items() if keys)}): {'; '.join(details)}",
        count,
    )


class NonFiniteWeights(UserError):
    """A file fits a network, but holds NaN or infinite weights."""


def check_finite(state_dict: StateDict, path: StrPath) -> None:
    """Raise NonFiniteWeights where the weights of a file are not all finite."""
    import torch

    wrong = [
        key
        for key, tensor in state_dict.items()
        if tensor.is_floating_point() and tensor.layout is torch.strided and not bool(tensor.float().isfinite().all())
    ]
    if wrong:
        raise NonFiniteWeights(
            f"{path}: {len(wrong)} of {len(state_dict)} tensors hold NaN or infinite values, for example {wrong[0]}; "
            "the training diverged or the file is damaged, take an earlier checkpoint"
        )


def _shown(key: str, state_dict: StateDict) -> str:
    """Name and shape of a tensor for a message."""
    return f"{printable(key)[:160]} {list(state_dict[key].shape)}"


def _implied_options(state_dict: StateDict, spec: ModelSpec) -> BuildOptions:
    """Build options that the tensors of a file imply."""
    weight = state_dict.get(spec.classifiers[0] + ".weight")
    num_classes = {} if weight is None else {"num_classes": weight.shape[0]}
    return {**spec.infer_options(state_dict), **num_classes}


def _plain_names(state_dict: StateDict, spec: ModelSpec, key_map: Callable[[StateDict], StateDict]) -> StateDict:
    """Names of a network that was saved within others: without inserted parts, and without a prefix of all names.

    The prefix is removed only where that leaves the network's classifier, so that a file that holds one part of the
    network keeps its names. `n_averaged` is the counter of torch's AveragedModel.
    """
    plain = {_INSERTED.sub("", key): tensor for key, tensor in state_dict.items() if key != "n_averaged"}
    prefix = os.path.commonprefix(list(plain)).rpartition(".")[0] + "."
    short = {key.removeprefix(prefix): tensor for key, tensor in plain.items()}
    found, shortened = key_map(plain), key_map(short)
    classifier = f"{spec.classifiers[0]}.weight"
    return shortened if classifier in shortened and classifier not in found else found


def _read_torch(path: pathlib.Path, spec: ModelSpec, use_ema: bool | None) -> Checkpoint:
    content = load_torch(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state dict or a dict with 'state_dict'")
    key, taken = _weights_key(path, content, use_ema)
    if not key:
        return _from_state_dict(path, spec, content, {})
    is_ours = "build" in content  # else a checkpoint of another trainer
    if is_ours and content.get("arch", spec.name) != spec.name:
        raise UserError(f"{path}: holds {content['arch']}, this program is for {spec.name}")
    metadata = {name: value for name, value in content.items() if _is_plain(value) and name != "build"}
    metadata["weights"] = "ema" if key in AVERAGED_KEYS else "raw"
    if not is_ours:
        # Other programs may mean something else by these names.
        metadata = {name: value for name, value in metadata.items() if name not in ("classes", "image_size")}
        return dataclasses.replace(_from_state_dict(path, spec, content[key], metadata), taken=taken)
    metadata["config"] = content.get("config")
    options = dict(content["build"])
    if content.get("num_classes") is not None:
        options.setdefault("num_classes", content["num_classes"])
    return Checkpoint(_plain_names(content[key], spec, dict), options, metadata, "zoo", taken)


def _weights_key(path: pathlib.Path, content: Mapping[str, Any], use_ema: bool | None) -> tuple[str, str]:
    """(key of the state dict in a checkpoint, Checkpoint.taken); two empty strings for a bare state dict."""
    raw = [key for key in RAW_KEYS if isinstance(content.get(key), Mapping)]
    averaged = [key for key in AVERAGED_KEYS if isinstance(content.get(key), Mapping)]
    wanted = raw if use_ema is False or not (averaged or use_ema) else averaged
    if not wanted and (raw or averaged or use_ema):
        flag, missing = (
            ("--no-use-ema", "weights beside its averages") if averaged else ("--use-ema", "averaged weights")
        )
        raise UserError(f"{flag}: {path} holds no {missing}; leave the option out")
    if not wanted:
        return "", ""
    others = [key for key in raw + averaged if key != wanted[0]]
    if others:
        switch = f" ({'--no-use-ema' if wanted is averaged else '--use-ema'} takes them)" if raw and averaged else ""
        return wanted[0], f"{path}: took the weights of {wanted[0]}; it also holds {', '.join(others)}{switch}"
    return wanted[0], "" if wanted[0] == "state_dict" else f"{path}: took the weights of {wanted[0]}"


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

    foreign = [str(key) for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if foreign or not all(isinstance(key, str) for key in state_dict):
        raise UserError(
            f"{path}: not a state dict, it holds {printable(', '.join(sorted(foreign)[:8]))}; expected tensors alone, "
            f"or a state dict under one of {', '.join(RAW_KEYS + AVERAGED_KEYS)}"
        )
    if not state_dict:
        raise UserError(f"{path}: not a state dict (it is empty)")
    state_dict = _plain_names(state_dict, spec, spec.key_maps.get("state_dict", dict))
    return Checkpoint(state_dict, dict(spec.format_options.get("state_dict", {})), metadata, "state_dict")


def load_safetensors(path: pathlib.Path) -> "tuple[StateDict, dict[str, str]]":
    """(tensors, metadata) of a safetensors file.

    Raises:
      UserError: damaged, or the package safetensors is not installed.
    """
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
        raise damaged(path, error) from error
    return state_dict, header.get("__metadata__") or {}


def _read_safetensors(path: pathlib.Path, spec: ModelSpec) -> Checkpoint:
    state_dict, foreign = load_safetensors(path)
    ours: Any = None
    with contextlib.suppress(ValueError):
        ours = json.loads(foreign.get(SAFETENSORS_KEY, "{}"))
    if not isinstance(ours, dict) or not isinstance(ours.get("build", {}), dict):
        ours = {}  # another program's entry of the same name
    if ours.get("arch", spec.name) != spec.name:
        raise UserError(f"{path}: holds {printable(str(ours['arch']))}, this program is for {spec.name}")
    checkpoint = _from_state_dict(path, spec, state_dict, {})
    return dataclasses.replace(
        checkpoint,
        format="safetensors",
        build_options={**checkpoint.build_options, **ours.get("build", {})},
        metadata={name: ours[name] for name in ("image_size", "classes") if ours.get(name)},
    )


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


def _reader(first_bytes: bytes, path: pathlib.Path) -> Callable[[pathlib.Path, ModelSpec], Checkpoint] | None:
    """The reader for a file, from its first bytes; None for `_read_torch`."""
    if error := refused(path, first_bytes):
        raise error
    if first_bytes.startswith(b"\x89HDF\r\n\x1a\n"):
        return _read_keras
    # The first field of a protobuf message. Our own runs write .ckpt files too, but those are zip archives.
    if first_bytes.startswith(b"\x0a") and path.suffix == ".ckpt":
        return _read_mindspore
    if first_bytes[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors
    if first_bytes.startswith(b"PK\x03\x04") and holds_keras(path):
        return _read_keras
    # A zip archive, or a pickle: what torch wrote before version 1.6.
    if first_bytes.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return None
    raise unknown_format(path, first_bytes)


def weight_file(name: str, spec: ModelSpec) -> str:
    """The file of --pretrained: `name`, or the public weights of the network, downloaded, where it is their name.

    Raises:
      UserError: neither; see `download`.
    """
    if os.path.exists(name):
        return name
    if name in spec.weight_names:
        return str(download(spec, flag="--pretrained"))
    names = f", or {' or '.join(spec.weight_names)} for the public weights" if spec.weight_names else ""
    raise UserError(f"--pretrained: {name} is not a file; give the path of a checkpoint{names}")


def download(spec: ModelSpec, folder: StrPath | None = None, flag: str = "--ckpt") -> pathlib.Path:
    """Download the public weights of a network once; their hash must be the one in the file name.

    Args:
      spec: the network, with `weight_urls`.
      folder: where to keep the file; default torch.hub's folder for checkpoints.
      flag: option that takes a file instead.
    Raises:
      UserError: no address answers, or the file is another one; says where to put a file downloaded by hand.
    """
    import torch

    if not spec.weight_urls:
        raise UserError(f"{flag}: no public weights are known for {spec.name}; give a checkpoint file")
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
            failures.append(f"{url} ({first_line(error)})")
    raise UserError(
        f"{flag}: {'not given, and ' if flag == '--ckpt' else ''}the public file could not be downloaded: "
        f"{'; '.join(failures)}; download {name} on another machine and pass it with {flag}, or put it at {target}"
    )
