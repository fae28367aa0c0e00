"""Weights from one program's file format to another's, written only when the new file computes the same logits."""

import dataclasses
import importlib
import pathlib

from common.errors import UserError
from common.files import atomic_path
from common.weights.load import load_model

TOLERANCE = 1e-5  # of the largest logit: the same weights in the same network, up to the order of float32 sums
WRITERS = {
    ".pth.tar": "zoo",
    ".pth": "state_dict",
    ".pt": "state_dict",
    ".safetensors": "safetensors",
    ".ckpt": "mindspore",
    ".h5": "keras",
}
FOREIGN = {
    "mindspore": "common.weights.mindspore",
    "keras": "common.weights.keras",
}  # format -> module with its `write`


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted: formats of both files, the network's build options, the largest difference of a logit."""

    source_format: str
    target_format: str
    build: dict
    difference: float


def convert(source, target, spec):
    """Write the weights in `source` as the format that the name of `target` says.

    The new file is read back as any reader of that format would read it. Where that gives a network with other
    properties (a pooling phase, an epsilon that the format cannot state), nothing is left at `target`.

    Args:
      source: checkpoint of any known format.
      target: file to write, replaced whole; its suffix is one of WRITERS.
      spec: ModelSpec.
    Returns:
      Conversion.
    Raises:
      UserError: see load_model; an unknown suffix; a property or logits that would differ.
    """
    target = pathlib.Path(target)
    name = format_of(target)
    if not target.parent.is_dir():
        raise UserError(f"{target}: {target.parent} is not a folder; create it first")
    model, meta = load_model(source, spec)
    with atomic_path(target, f".tmp{target.suffix}") as draft:
        _write(name, draft, target, model.state_dict(), spec, meta)
        again, meta_again = load_model(draft, spec)
        _refuse_other_properties(source, target, spec, meta, meta_again)
        difference = _difference(model, again, spec)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{target}: not written, its logits differ from those of {source} by {difference:.3g} "
                f"of the largest; allowed is {TOLERANCE}"
            )
    return Conversion(meta["format"], name, meta["build"], difference)


def format_of(path):
    """Format name that the suffix of a file to write stands for."""
    for suffix, name in WRITERS.items():
        if path.name.endswith(suffix):
            return name
    raise UserError(f"{path}: unknown format; the name must end in one of {', '.join(WRITERS)}")


def _write(name, path, target, state_dict, spec, meta):
    if name in FOREIGN:
        if name not in spec.key_maps:
            others = ", ".join(suffix for suffix, other in WRITERS.items() if other not in FOREIGN)
            raise UserError(f"{target.name}: {spec.name} has no {name} format; the name must end in one of {others}")
        theirs = spec.export_maps.get(name, dict)(state_dict)
        importlib.import_module(FOREIGN[name]).write(path, theirs)
    elif name == "safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError as error:
            raise UserError(f"{target.name}: it needs the safetensors package; pip install safetensors") from error
        save_file({key: tensor.contiguous() for key, tensor in state_dict.items()}, path)
    else:
        import torch

        facts = {key: meta[key] for key in ("build", "image_size", "classes")}
        torch.save({"arch": spec.name, **facts, "state_dict": state_dict} if name == "zoo" else state_dict, path)


def _refuse_other_properties(source, target, spec, before, after):
    """UserError where a reader of the new file would build another network; dropout matters to training alone."""
    differing = [
        option
        for option in before["build"]
        if option != "dropout" and before["build"][option] != after["build"][option]
    ]
    if differing:
        here = ", ".join(f"{option} {before['build'][option]}" for option in differing)
        there = ", ".join(f"{option} {after['build'][option]}" for option in differing)
        raise UserError(
            f"{target}: not written, {spec.name} in {source} has {here}, but a file of this format means "
            f"{there}: the same weights would give other logits"
        )


def _difference(model, again, spec):
    """Largest difference between the logits of two networks for one random image, as a share of the largest logit."""
    import torch

    image = torch.randn(1, 3, spec.input_size, spec.input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, logits_again = model(image), again(image)
    return float((logits - logits_again).abs().max() / logits.abs().max())
