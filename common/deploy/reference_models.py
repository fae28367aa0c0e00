"""Networks of torchvision and timm with their own weights and evaluation transforms, as references.

torchvision:NAME and timm:NAME download the default weights, torchvision:NAME=FILE and timm:NAME=FILE take a state dict.
"""

import contextlib
import math
import os
import pathlib
import sys
import typing
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from common.evaluation.input_pipeline import InputPipeline
from common.weights.load import load_safetensors
from common.weights.torch_file import first_line, load_torch

if typing.TYPE_CHECKING:
    import torch

PREFIXES = ("torchvision:", "timm:")


class Reference(typing.NamedTuple):
    """A network in evaluation mode, what it takes, and the names of its columns where its package has them."""

    model: "torch.nn.Module"
    pipeline: InputPipeline
    num_classes: int


_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of torchvision's networks that only training uses


def load(argument: str) -> Reference:
    """Build the network that an argument names.

    Raises:
      UserError: a package or name that does not exist, weights that cannot be downloaded or do not fit.
    """
    package, _, rest = argument.partition(":")
    name, _, path = rest.partition("=")
    weights = _read(path) if path else None
    build = _torchvision if package == "torchvision" else _timm
    try:
        # timm and torchvision print which file they download.
        with contextlib.redirect_stdout(sys.stderr):
            model, pipeline = build(name, weights, argument)
    except OSError as error:
        raise UserError(
            f"{argument}: its weights cannot be downloaded ({first_line(error)}); give a file, {package}:{name}=FILE"
        ) from error
    if weights is not None:
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise UserError(f"{argument}: {path} does not fit ({' '.join(str(error).split())[:200]})") from error
        needed = [key for key in missing if not key.startswith(_AUXILIARY)]
        if needed or unexpected:
            raise UserError(
                f"{argument}: {path} does not fit ({len(needed)} names are missing, {len(unexpected)} unexpected, for "
                f"example {(needed + unexpected)[0]})"
            )
    return Reference(model.eval(), pipeline, _num_columns(model, pipeline.size))


def _read(path: str) -> "Mapping[str, torch.Tensor]":
    if not os.path.isfile(path):
        raise UserError(f"{path}: does not exist; give a state dict of torch.save or a .safetensors file")
    if path.endswith(".safetensors"):
        return load_safetensors(pathlib.Path(path))[0]
    content = load_torch(path)
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    import torch

    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no state dict; expected a file of torch.save(model.state_dict(), FILE)")
    return content


def _options(weights: "Mapping[str, torch.Tensor] | None") -> dict[str, Any]:
    """num_classes of a state dict: the rows of its last matrix."""
    matrices = [value for value in (weights or {}).values() if value.ndim == 2]
    return {"num_classes": len(matrices[-1])} if matrices else {}


def _torchvision(
    name: str, weights: "Mapping[str, torch.Tensor] | None", argument: str
) -> "tuple[torch.nn.Module, InputPipeline]":
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UserError(f"{argument}: torchvision has no classifier {name}; models.list_models() lists them")
    entry = models.get_model_weights(name).DEFAULT
    if weights is None:
        model = models.get_model(name, weights=entry)
    else:
        model = models.get_model(name, weights=None, **_options(weights))
        if hasattr(model, "transform_input"):
            model.transform_input = True  # what weights=DEFAULT does
    preset = entry.transforms()
    pipeline = InputPipeline(
        size=preset.crop_size[0],
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=_triple(preset.mean),
        std=_triple(preset.std),
    )
    return model, pipeline


def _timm(
    name: str, weights: "Mapping[str, torch.Tensor] | None", argument: str
) -> "tuple[torch.nn.Module, InputPipeline]":
    try:
        import timm
        from timm.data import resolve_data_config
    except ImportError as error:
        raise UserError(f"{argument}: needs timm; pip install timm") from error
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"{argument}: timm has no model {name}; timm.list_models() lists them")
    model = timm.create_model(name, pretrained=weights is None, **_options(weights))
    config = resolve_data_config({}, model=model)
    side, mode = config["input_size"][-1], config["crop_mode"]
    if mode not in ("center", "squash"):
        raise UserError(f"{argument}: its transform crops by {mode!r}; only center and squash are computed here")
    pipeline = InputPipeline(
        size=side,
        resize=math.floor(side / config["crop_pct"]),
        interpolation=config["interpolation"],
        geometry=mode,
        mean=_triple(config["mean"]),
        std=_triple(config["std"]),
    )
    return model, pipeline


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _num_columns(model: "torch.nn.Module", size: int) -> int:
    import torch

    with torch.inference_mode():
        return model(torch.zeros(1, 3, size, size)).shape[-1]
