"""Checkpoint -> ONNX file that onnx.checker, ONNX Runtime and atc accept, or no file at all."""

import dataclasses
import json
import pathlib
import warnings

from common import cli
from common.errors import UserError
from common.files import atomic_path
from common.weights.load import download, load_model

TOLERANCE = 1e-4  # of the largest logit, and at least 1: what a different order of float32 sums explains
OPSETS = (9, 18)  # what atc's parser has tables for, over all CANN versions


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of the export scripts."""

    ckpt: str = cli.option("", "checkpoint file")
    onnx: str = cli.option("out.onnx", "ONNX file to write")
    opset: int = cli.option(11, "ONNX operator set; every CANN takes 9 to 13", low=OPSETS[0], high=OPSETS[1])
    batch: str = cli.option("dynamic", "images per run: a number that is then fixed, or the word dynamic")
    num_classes: int | None = cli.option(
        None, "columns of the output; cuts off a background class (default: as stored)", low=1
    )
    image_size: int | None = cli.option(None, "side of the input, pixels (default: as stored)", low=1)

    def __post_init__(self):
        cli.check_ranges(self)
        batch_size(self.batch)


def batch_size(word):
    """Value of --batch: None for "dynamic", else a positive int."""
    if word == "dynamic":
        return None
    if not word.isdecimal() or int(word) < 1:
        raise UserError(f"--batch: {word}, must be a number of at least 1 or the word dynamic")
    return int(word)


def main(spec, description, recipe=None, default_ckpt=None, argv=None):
    """Body of a model's export script.

    Args:
      spec: ModelSpec.
      description: the script's docstring.
      recipe: ExportConfig with the model's defaults.
      default_ckpt: called without arguments for a path when --ckpt is not given; default: download the public file.
      argv: command line for tests.
    """
    with cli.exit_on_error():
        config, _ = cli.parse(recipe or ExportConfig(), description, argv)
        export(spec, config, default_ckpt)


def export(spec, config, default_ckpt=None):
    """Write the ONNX file that an ExportConfig asks for and print what it is. Arguments and errors: see `main`."""
    ckpt = config.ckpt or (default_ckpt or (lambda: download(spec)))()
    model, meta = load_model(ckpt, spec, num_classes=config.num_classes)
    size = config.image_size or meta["image_size"]
    if config.image_size and meta["format"] == "zoo" and size != meta["image_size"]:
        raise UserError(f"--image-size: {size}, but {ckpt} was trained at {meta['image_size']}")
    spec.check_image_size(size)
    difference = export_onnx(model, spec, config.onnx, size, batch_size(config.batch), config.opset, meta)
    print(
        f"{config.onnx}: {spec.name} from {ckpt} ({meta['format']}), {spec.onnx_input} "
        f"[{config.batch}, 3, {size}, {size}] -> {spec.onnx_output} [{config.batch}, {meta['num_classes']}], "
        f"opset {config.opset}; largest difference from torch {difference:.2e}"
    )


def export_onnx(model, spec, path, image_size, batch=None, opset=11, meta=None):
    """Write a network as an ONNX file, and leave it there only if it computes what torch computes.

    Args:
      model: nn.Module; exported in evaluation mode, its own mode is restored.
      spec: ModelSpec, for names and normalization.
      path: file to write, replaced whole.
      image_size: side of the input, pixels.
      batch: images per run, or None for a dynamic batch axis.
      opset: ONNX operator set.
      meta: facts to store in the file, as from weights.load ("classes" is used).
    Returns:
      Largest absolute difference between the logits of torch and ONNX Runtime.
    Raises:
      UserError: the exporter gave another opset, or the results differ by more than 1e-4 of the largest logit.
    """
    import onnx

    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise UserError(f"--onnx: {path.parent} is not a folder; create it first")
    mode = model.training
    model.eval()
    try:
        with atomic_path(path, ".tmp.onnx") as draft:
            _trace(model, spec, draft, image_size, batch, opset)
            proto = onnx.load(draft)
            found = {entry.domain: entry.version for entry in proto.opset_import}
            if found.get("") != opset:
                raise UserError(f"--opset: {opset} was asked for, but the exporter wrote {found}; choose 11 or 13")
            onnx.checker.check_model(proto)
            onnx.helper.set_model_props(proto, _facts(spec, image_size, meta or {}))
            onnx.save(proto, draft)
            difference = max(_difference(model, draft, n, image_size) for n in ([batch] if batch else [1, 3]))
    finally:
        model.train(mode)
    return difference


def _trace(model, spec, path, image_size, batch, opset):
    import torch

    device = next(model.parameters()).device
    dummy = torch.zeros(batch or 1, 3, image_size, image_size, device=device)
    axes = None if batch else {spec.onnx_input: {0: "batch"}, spec.onnx_output: {0: "batch"}}
    with warnings.catch_warnings():
        # A side that a network reads becomes a constant of the graph, as it should: only the batch axis is dynamic.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        # dynamo=True cannot write opset 11, and its ReduceMean is one that atc reads wrongly
        torch.onnx.export(
            model,
            (dummy,),
            str(path),
            input_names=[spec.onnx_input],
            output_names=[spec.onnx_output],
            opset_version=opset,
            dynamic_axes=axes,
            dynamo=False,
        )


def _facts(spec, image_size, meta):
    """What tools need to know about the file without the checkpoint: stored as metadata that atc ignores."""
    facts = {
        "arch": spec.name,
        "image_size": str(image_size),
        "mean": json.dumps(spec.mean),
        "std": json.dumps(spec.std),
    }
    if meta.get("classes"):
        facts["classes"] = json.dumps(list(meta["classes"]))
    return facts


def _difference(model, path, batch, image_size):
    """Largest difference between torch and ONNX Runtime on one random batch; UserError when it is too large."""
    import numpy as np
    import onnxruntime
    import torch

    # Soft blobs, as photographs have them: white noise drives a trained network far outside its range.
    blobs = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    images = torch.nn.functional.interpolate(blobs, size=(image_size, image_size), mode="bilinear")
    with torch.inference_mode():
        expected = model(images.to(next(model.parameters()).device)).float().cpu().numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    actual = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    difference, largest = float(np.abs(actual - expected).max()), float(np.abs(expected).max())
    if not difference <= TOLERANCE * max(1.0, largest):  # also true for NaN
        raise UserError(
            f"--onnx: not written, ONNX Runtime differs from torch by {difference:.3g} where the largest "
            f"logit is {largest:.3g} (batch {batch}); allowed is {TOLERANCE} of it"
        )
    return difference
