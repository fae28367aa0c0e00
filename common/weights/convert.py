"""Convert a checkpoint to another file format; written only if the new file gives the same logits."""

import dataclasses
import importlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from common.files import StrPath, atomic_path, check_distinct
from common.spec import BuildOptions, ModelSpec, StateDict
from common.weights.load import SAFETENSORS_KEY, TRAINING_ONLY, load_model

TOLERANCE = 1e-5  # of the largest logit: the same weights in the same network, up to the order of float32 sums
FORMATS = {
    ".pth.tar": "zoo",
    ".pth": "state_dict",
    ".pt": "state_dict",
    ".safetensors": "safetensors",
    ".ckpt": "mindspore",
    ".h5": "keras",  # and .weights.h5
    ".keras": "keras",
}
# Format of another framework -> module with its `write`.
FOREIGN = {"mindspore": "common.weights.mindspore", "keras": "common.weights.keras"}
# What reads a format, with the names of the files.
_READERS = {
    "state_dict": "timm and other PyTorch programs (.pth, .safetensors, --to hub)",
    "mindspore": "MindSpore (.ckpt)",
    "keras": "Keras (.h5, .keras)",
}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
      build: build options of the network.
      taken: see common.weights.load.Checkpoint.
      difference: largest difference of a logit, as a share of the largest logit.
      notes: what was changed to keep the logits, and which programs do not read the file; one line each.
    """

    source_format: str
    target_format: str
    build: BuildOptions
    difference: float
    taken: str
    notes: tuple[str, ...] = ()


def convert(source: StrPath, target: StrPath, spec: ModelSpec, use_ema: bool | None = None) -> Conversion:
    """Write the weights in `source` in the format that the suffix of `target` names (see FORMATS).

    Where a file of that format means another build option, the weights are changed if that keeps the logits (see
    ModelSpec.folds). Else .pth and .safetensors files state the option, and for other formats `target` is not written.
    The new file is read back, and must give the same logits.

    Args:
      use_ema: see common.weights.load.read_checkpoint.
    Raises:
      UserError: see load_model; an unknown suffix; build options or logits that would differ.
    """
    target = pathlib.Path(target)
    name = format_of(target)
    check_distinct(target, "OUT", {"IN": source})
    model, meta = load_model(source, spec, use_ema)
    refused = f"{target}: not written,"
    state_dict, build, notes = fitted(model.state_dict(), meta, name, spec, f"{refused} {spec.name} in {source}")
    suffix = next(suffix for suffix in (".weights.h5", target.suffix) if target.name.endswith(suffix))
    with atomic_path(target, f".tmp{suffix}") as draft:
        _write(name, draft, target, state_dict, spec, {**meta, "build": build})
        difference = check_same_logits(
            model, draft, spec, meta["image_size"], f"{refused} its logits differ from those of {source}"
        )
    return Conversion(meta["format"], name, build, difference, meta["taken"], notes)


def fitted(
    state_dict: dict[str, Any], meta: Mapping[str, Any], name: str, spec: ModelSpec, refused: str
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """(weights, build options, notes) of a network with the same logits in the format `name`.

    Args:
      refused: start of the message where there are none.
    """
    build = dict(meta["build"])
    if name == "zoo":
        return state_dict, build, ()
    own = name in ("state_dict", "safetensors")
    kind = "state_dict" if own or name == "hub" else name
    means = {**spec.infer_options(state_dict), **spec.format_options.get(kind, {})}
    differing = _differing(build, means)
    fixed = _fixed(differing, spec, meta["image_size"])
    if fixed and own:
        return (
            state_dict,
            build,
            (f"{_listed(build, fixed)}: stated in the file; other programs do not build this network",),
        )
    if fixed:
        raise UserError(
            f"{refused} has {_listed(build, fixed)}, but a file of this format means {_listed(means, fixed)}: "
            "the same weights would give other logits"
        )
    notes = []
    for option in TRAINING_ONLY:
        if option in means and build[option] != means[option]:
            notes.append(f"{option} {build[option]} became {means[option]}, which no evaluation uses")
            build[option] = means[option]
    for option, value in differing.items():
        changed, side = f"{option} {build[option]} became {value}", meta["image_size"]
        if option in spec.folds:
            state_dict = dict(spec.folds[option](state_dict, build[option], value))
            notes.append(f"{changed}: the weights were changed so that evaluation gives the same logits")
        else:
            notes.append(f"{changed}, which is the same at {side} x {side} pixels, not at all sizes")
        build[option] = value
    return state_dict, build, tuple(notes)


def destinations(spec: ModelSpec, build: BuildOptions, image_size: int) -> str:
    """One line on the programs for which `convert` can write the weights of a network; empty where no option matters.

    Args:
      image_size: of evaluation, pixels; networks that differ in an option may be the same function at some sizes.
    """
    formats = {name: spec.format_options[name] for name in _READERS if name in spec.format_options}
    fixed = {name: _fixed(_differing(build, means), spec, image_size) for name, means in formats.items()}
    matter = [
        o for o in build if o not in (*TRAINING_ONLY, *spec.folds) and any(o in each for each in formats.values())
    ]
    if not matter:
        return ""
    line = f"weights with {_listed(build, matter)} at {image_size} x {image_size} pixels can be converted for "
    line += " and ".join(_READERS[name] for name in formats if not fixed[name])
    for needed in dict.fromkeys(_listed(formats[name], fixed[name]) for name in formats if fixed[name]):
        others = [_READERS[name] for name in formats if _listed(formats[name], fixed[name]) == needed]
        line += f"; not for {' and '.join(others)}, which have {needed}"
    return line


def _differing(build: BuildOptions, means: BuildOptions) -> dict[str, Any]:
    """Build options of a format that change logits and are not those of the network."""
    return {
        option: value
        for option, value in means.items()
        if option not in TRAINING_ONLY and build.get(option, value) != value
    }


def _fixed(differing: BuildOptions, spec: ModelSpec, image_size: int) -> list[str]:
    """Those of `differing` for which no weights give the same logits."""
    return [o for o in differing if o not in spec.folds and not spec.same_at(o, image_size)]


def write_safetensors(path: pathlib.Path, state_dict: StateDict, spec: ModelSpec, meta: Mapping[str, Any]) -> None:
    """Write weights, and as metadata what this repository needs to build the same network.

    Raises:
      UserError: the safetensors package is missing.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError(f"{path.name}: it needs the safetensors package; pip install safetensors") from error
    stored = {key: meta[key] for key in ("build", "image_size", "classes")}
    metadata = {"format": "pt", SAFETENSORS_KEY: json.dumps({"arch": spec.name, **stored})}
    tensors = {key: tensor.contiguous() for key, tensor in state_dict.items()}
    path.write_bytes(save(tensors, metadata))  # save_file lets nobody but the owner read the file


def check_same_logits(model: Any, path: StrPath, spec: ModelSpec, image_size: int, refused: str) -> float:
    """Largest difference between the logits of a network and those of a file, as a share of the largest logit.

    Raises:
      UserError: it is above TOLERANCE.
    """
    difference = _difference(model, load_model(path, spec)[0], image_size)
    if not difference <= TOLERANCE:
        raise UserError(f"{refused} by {difference:.3g} of the largest; allowed is {TOLERANCE}")
    return difference


def _listed(build: BuildOptions, options: list[str]) -> str:
    return ", ".join(f"{option} {build[option]}" for option in options)


def format_of(path: pathlib.Path) -> str:
    """Format of a file to write, from its suffix."""
    for suffix, name in FORMATS.items():
        if path.name.endswith(suffix):
            return name
    hint = f"; the ending is {path.suffix.lower()}, not {path.suffix}" if path.suffix.lower() in FORMATS else ""
    raise UserError(f"{path}: unknown format; the name must end in one of {', '.join(FORMATS)}{hint}")


def _write(
    name: str,
    draft: pathlib.Path,
    target: pathlib.Path,
    state_dict: dict[str, Any],
    spec: ModelSpec,
    meta: Mapping[str, Any],
) -> None:
    if name in FOREIGN:
        if name not in spec.key_maps:
            others = ", ".join(suffix for suffix, each in FORMATS.items() if each not in {*FOREIGN} - {*spec.key_maps})
            raise UserError(f"{target}: {spec.name} has no {name} format; the name must end in one of {others}")
        foreign = spec.export_maps.get(name, dict)(state_dict)
        if target.suffix == ".keras":
            _write_keras_archive(
                draft, target, foreign, spec, len(state_dict[f"{spec.classifiers[0]}.bias"]), meta["image_size"]
            )
        else:
            importlib.import_module(FOREIGN[name]).write(draft, foreign)
    elif name == "safetensors":
        write_safetensors(draft, state_dict, spec, meta)
    else:
        import torch

        means = {**spec.infer_options(state_dict), **spec.format_options.get(name, {})}
        stated = name == "zoo" or any(meta["build"].get(option, value) != value for option, value in means.items())
        stored = {key: meta[key] for key in ("build", "image_size", "classes")}
        with open(draft, "wb") as file:  # torch reports a full disk as a RuntimeError where it opens the file itself
            torch.save({"arch": spec.name, **stored, "state_dict": state_dict} if stated else state_dict, file)


def _write_keras_archive(
    draft: pathlib.Path, target: pathlib.Path, foreign: StateDict, spec: ModelSpec, classes: int, image_size: int
) -> None:
    """A .keras archive holds Keras' own description of the network, so Keras writes it; its outputs are logits."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        import keras  # type: ignore[import-not-found]  # optional
    except ImportError as error:
        raise UserError(
            f"{target}: Keras writes .keras archives; pip install keras, or load a .weights.h5 file in Keras"
        ) from error
    from common.weights.keras import write

    network = getattr(keras.applications, spec.keras_name)(
        weights=None, classes=classes, classifier_activation=None, input_shape=(image_size, image_size, 3)
    )
    weights = draft.with_suffix(".weights.h5")
    try:
        write(weights, foreign)
        network.load_weights(weights)
    finally:
        weights.unlink(missing_ok=True)
    network.save(draft)


def _difference(model: Any, other: Any, image_size: int) -> float:
    """Largest difference between the logits of two networks for one random image, as a share of the largest logit."""
    import torch

    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, other_logits = model(image), other(image)
    return float((logits - other_logits).abs().max() / logits.abs().max())
