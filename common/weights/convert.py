"""Convert a checkpoint to another file format; written only if the new file gives the same logits."""

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from common.files import StrPath, atomic_path
from common.spec import BuildOptions, ModelSpec
from common.weights.load import load_model

TOLERANCE = 1e-5  # of the largest logit: the same weights in the same network, up to the order of float32 sums
FORMATS = {
    ".pth.tar": "zoo",
    ".pth": "state_dict",
    ".pt": "state_dict",
    ".safetensors": "safetensors",
    ".ckpt": "mindspore",
    ".h5": "keras",
}
# Format of another framework -> module with its `write`.
FOREIGN = {"mindspore": "common.weights.mindspore", "keras": "common.weights.keras"}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
      build: build options of the network.
      taken: see common.weights.load.Checkpoint.
      difference: largest difference of a logit, as a share of the largest logit.
    """

    source_format: str
    target_format: str
    build: BuildOptions
    difference: float
    taken: str


def convert(source: StrPath, target: StrPath, spec: ModelSpec, use_ema: bool | None = None) -> Conversion:
    """Write the weights in `source` in the format that the suffix of `target` names (see FORMATS).

    The new file is read back. Where that gives a network with other build options (a pooling phase, an epsilon that the
    format cannot state), `target` is not written.

    Args:
      use_ema: see common.weights.load.read_checkpoint.
    Raises:
      UserError: see load_model; an unknown suffix; build options or logits that would differ.
    """
    target = pathlib.Path(target)
    name = format_of(target)
    if not target.parent.is_dir():
        raise UserError(f"{target}: {target.parent} is not a folder; create it first")
    model, meta = load_model(source, spec, use_ema)
    with atomic_path(target, f".tmp{target.suffix}") as draft:
        _write(name, draft, target, model.state_dict(), spec, meta)
        reread, reread_meta = load_model(draft, spec)
        _check_build_options(source, target, spec, meta["build"], reread_meta["build"])
        difference = _difference(model, reread, spec)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{target}: not written, its logits differ from those of {source} by {difference:.3g} "
                f"of the largest; allowed is {TOLERANCE}"
            )
    return Conversion(meta["format"], name, meta["build"], difference, meta["taken"])


def format_of(path: pathlib.Path) -> str:
    """Format of a file to write, from its suffix."""
    for suffix, name in FORMATS.items():
        if path.name.endswith(suffix):
            return name
    raise UserError(f"{path}: unknown format; the name must end in one of {', '.join(FORMATS)}")


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
            others = ", ".join(suffix for suffix, other in FORMATS.items() if other not in FOREIGN)
            raise UserError(f"{target.name}: {spec.name} has no {name} format; the name must end in one of {others}")
        foreign = spec.export_maps.get(name, dict)(state_dict)
        importlib.import_module(FOREIGN[name]).write(draft, foreign)
    elif name == "safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise UserError(f"{target.name}: it needs the safetensors package; pip install safetensors") from error
        save_file({key: tensor.contiguous() for key, tensor in state_dict.items()}, draft)
    else:
        import torch

        stored = {key: meta[key] for key in ("build", "image_size", "classes")}
        torch.save({"arch": spec.name, **stored, "state_dict": state_dict} if name == "zoo" else state_dict, draft)


def _check_build_options(
    source: StrPath, target: StrPath, spec: ModelSpec, before: BuildOptions, after: BuildOptions
) -> None:
    """UserError where the new file is read as another network; dropout does not change logits."""
    differing = [option for option in before if option != "dropout" and before[option] != after[option]]
    if differing:
        here, there = (", ".join(f"{option} {build[option]}" for option in differing) for build in (before, after))
        raise UserError(
            f"{target}: not written, {spec.name} in {source} has {here}, but a file of this format means "
            f"{there}: the same weights would give other logits"
        )


def _difference(model: Any, other: Any, spec: ModelSpec) -> float:
    """Largest difference between the logits of two networks for one random image, as a share of the largest logit."""
    import torch

    image = torch.randn(1, 3, spec.input_size, spec.input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, other_logits = model(image), other(image)
    return float((logits - other_logits).abs().max() / logits.abs().max())
