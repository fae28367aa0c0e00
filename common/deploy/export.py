"""Checkpoint -> ONNX file that onnx.checker accepts, atc can parse, and ONNX Runtime computes as torch does."""

import dataclasses
import pathlib
import re
import typing
import warnings
from collections.abc import Callable, Sequence

from common import cli, files
from common.errors import UserError
from common.evaluation import onnx_conversion, onnx_metadata
from common.files import atomic_path
from common.spec import ModelSpec
from common.weights.load import download, load_model

if typing.TYPE_CHECKING:
    import onnx
    import torch

INPUT_DTYPES = ("float32", "float16")
OPSETS = (9, 20)  # of torch's exporter; atc takes fewer (docs/ASCEND.md), and run_atc.py checks that


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of the export scripts."""

    ckpt: str = cli.option("", "checkpoint file")
    onnx: str = cli.option("out.onnx", "ONNX file to write")
    opset: int = cli.option(
        onnx_conversion.OPSET,
        "ONNX operator set; every CANN takes 9 to 13, ONNX Runtime and OpenVINO all",
        low=OPSETS[0],
        high=OPSETS[1],
    )
    batch: str = cli.option("dynamic", "images per run: a number that is then fixed, or the word dynamic")
    input_dtype: str = cli.option(
        "float32", "type of the input, computed in float32; for files of preprocess.py --dtype", choices=INPUT_DTYPES
    )
    precision: str = cli.option("float32", "what the network computes in; input and output stay", choices=INPUT_DTYPES)
    simplify: bool = cli.option(False, "fold and merge nodes with onnxslim (pip install onnxslim)")
    num_classes: int | None = cli.option(
        None, "columns of the output; cuts off a background class (default: as stored)", low=1
    )
    image_size: int | None = cli.option(None, "side of the input, pixels (default: as stored)", low=1)

    use_ema: bool | None = cli.option(None, "take the averaged weights; default: where the checkpoint has them")

    def __post_init__(self) -> None:
        cli.check_ranges(self)
        if not re.fullmatch(r"dynamic|0*[1-9]\d*", self.batch):
            raise UserError(f"--batch: {self.batch}, must be a number of at least 1 or the word dynamic")

    @property
    def fixed_batch(self) -> int | None:
        """Batch size of the file; None for a dynamic batch axis."""
        return None if self.batch == "dynamic" else int(self.batch)


def main(
    spec: ModelSpec,
    description: str,
    defaults: ExportConfig | None = None,
    default_checkpoint: Callable[[], pathlib.Path] | None = None,
) -> None:
    """Body of a model's export script.

    Args:
      defaults: options of the model.
      default_checkpoint: called where --ckpt is not given; default: download the public weights.
    """
    with cli.exit_on_error():
        config, _ = cli.parse(defaults or ExportConfig(), description)
        files.check_distinct(config.onnx, "--onnx", {"--ckpt": config.ckpt})
        with files.claimed_file(config.onnx, "--onnx"):
            export(spec, config, default_checkpoint)


def export(spec: ModelSpec, config: ExportConfig, default_checkpoint: Callable[[], pathlib.Path] | None = None) -> None:
    """Write the ONNX file and print one line about it."""
    ckpt = config.ckpt or (default_checkpoint() if default_checkpoint else download(spec))
    model, meta = load_model(ckpt, spec, config.use_ema, num_classes=config.num_classes)
    if meta["taken"]:
        print(meta["taken"], flush=True)
    size = config.image_size or meta["image_size"]
    if config.image_size and meta["format"] == "zoo" and size != meta["image_size"]:
        raise UserError(f"--image-size: {size}, but {ckpt} is evaluated at {meta['image_size']}")
    spec.check_image_size(size)
    difference = export_onnx(
        model,
        spec,
        config.onnx,
        size,
        config.fixed_batch,
        config.opset,
        meta["classes"],
        config.input_dtype,
        config.precision,
        config.simplify,
    )
    dtype = "" if config.input_dtype == "float32" else f"{config.input_dtype} "
    precision = "" if config.precision == "float32" else f", computed in {config.precision}"
    print(
        f"{config.onnx}: {spec.name} from {ckpt} ({meta['format']}), {dtype}{spec.onnx_input} "
        f"[{config.batch}, 3, {size}, {size}] -> {spec.onnx_output} [{config.batch}, {meta['num_classes']}], "
        f"opset {config.opset}{precision}; largest difference from torch {difference:.1e} of the largest logit"
    )


def export_onnx(
    model: "torch.nn.Module",
    spec: ModelSpec,
    path: str | pathlib.Path,
    image_size: int,
    batch: int | None = None,
    opset: int = onnx_conversion.OPSET,
    classes: Sequence[str] | None = None,
    input_dtype: str = "float32",
    precision: str = "float32",
    simplify: bool = False,
) -> float:
    """Write a network in evaluation mode as an ONNX file, and keep the file only if its logits are those of torch.

    Args:
      path: file to write or replace.
      image_size: side of the input, pixels.
      batch: fixed batch size; None for a dynamic batch axis.
      classes: class names to store.
      input_dtype: of INPUT_DTYPES.
      precision: what the network computes in, of INPUT_DTYPES.
      simplify: run onnxslim.
    Returns:
      Largest difference between the logits of torch and ONNX Runtime, as a share of the largest logit.
    Raises:
      UserError: the exporter wrote another opset, the logits differ by more than onnx_conversion.TOLERANCES, or
        onnxslim is missing.
    """
    import onnx

    path = pathlib.Path(path)
    metadata = onnx_metadata.OnnxMetadata(
        arch=spec.name, image_size=image_size, mean=spec.mean, std=spec.std, precision=precision
    )
    if classes:
        metadata["classes"] = list(classes)
    was_training = model.training
    model.eval()
    try:
        with atomic_path(path, ".tmp.onnx") as draft:
            onnx_conversion.trace(model, spec, draft, image_size, batch, opset, input_dtype)
            proto = onnx.load(draft)
            written = {entry.domain: entry.version for entry in proto.opset_import}
            if written.get("") != opset:
                raise UserError(f"--opset: {opset} was asked for, but the exporter wrote {written}; choose 11 or 13")
            if simplify:
                proto = _simplified(proto)
            if precision == "float16":
                proto = _half(proto)
            onnx.checker.check_model(proto, full_check=True)
            onnx.helper.set_model_props(proto, onnx_metadata.encode(metadata))
            onnx.save(proto, draft)
            sizes = [batch] if batch else [1, 3]
            difference = max(
                onnx_conversion.check_logits(model, draft, n, image_size, input_dtype, precision, "--onnx: not written")
                for n in sizes
            )
    finally:
        model.train(was_training)
    return difference


def _simplified(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    try:
        import onnxslim
    except ImportError as error:
        raise UserError("--simplify: needs onnxslim; pip install onnxslim, or leave the option out") from error
    return onnxslim.slim(proto)


def _half(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """Weights and arithmetic in float16, input and output as they are."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # weights that round to zero; the logits tell
        wrapped = ONNXModel(convert_float_to_float16(proto, keep_io_types=True))
    wrapped.topological_sort()  # the converter appends the casts of the input, which onnx.checker refuses
    return wrapped.model
