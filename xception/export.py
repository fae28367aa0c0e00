"""Export an Xception checkpoint to ONNX.

    python xception/export.py --ckpt_file gpu-ckpt/Xception-rank0-250_2502.ckpt --file_name xception --file_format ONNX

The file is written only if onnx.checker accepts it and its logits in ONNX Runtime are those of PyTorch. For an Ascend
NPU, `python tools/run_atc.py` converts it to an OM file.
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli
from common.deploy import export
from common.errors import UserError
from xception.src import config as recipes
from xception.src.run_log import newest_checkpoint

NEEDS_MINDSPORE = (
    "can only be written by MindSpore; convert the checkpoint to its .ckpt with tools/convert_weights.py "
    "and export it there, or use ONNX, which tools/run_atc.py converts to an OM file for the same devices"
)


@dataclasses.dataclass(frozen=True)
class XceptionExportConfig(export.ExportConfig):
    """ExportConfig under the option names of the original package."""

    ckpt: str = cli.renamed(export.ExportConfig, "ckpt", "--ckpt-file")
    onnx: str = cli.renamed(export.ExportConfig, "onnx", "--file-name", default="xception", help="file, .onnx is added")
    file_format: str = cli.option("ONNX", "format to write", choices=("ONNX", "AIR", "MINDIR"))
    width: int | None = cli.option(None, "width of the input, pixels (default: as stored)", low=1)
    height: int | None = cli.option(None, "height of the input, pixels; equal to the width", low=1)
    device_target: str = cli.option("CPU", "accepted; the file is the same", choices=("Ascend", "GPU", "CPU"))


def main() -> None:
    config, _ = cli.parse(XceptionExportConfig(), __doc__)
    if config.file_format != "ONNX":
        raise UserError(f"--file-format: {config.file_format} {NEEDS_MINDSPORE}")
    size = config.width or config.height or config.image_size
    if (config.height or size) != size:
        raise UserError(f"--height: {config.height}, must equal --width {size}: images are cropped to squares")
    if size:
        recipes.SPEC.check_image_size(size, "--width" if config.width else "--height")
    name = config.onnx if config.onnx.endswith(".onnx") else config.onnx + ".onnx"
    config = dataclasses.replace(config, onnx=name, image_size=size)
    export.export(recipes.SPEC, config, default_checkpoint=newest_checkpoint)


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
