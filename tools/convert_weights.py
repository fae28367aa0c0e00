"""Convert weights between the formats of PyTorch, timm, Cadene, MindSpore, Keras and this repository.

    python tools/convert_weights.py xception.ckpt xception.pth.tar
    python tools/convert_weights.py model_best.pth.tar hub_folder --to hub
    python tools/convert_weights.py gpu-ckpt/Xception-rank0-250_2502.ckpt official.ckpt

The format of IN is recognized by content, that of OUT by its name: .pth.tar (checkpoint of this repository), .pth .pt
.safetensors (timm, Cadene, torchvision), .ckpt (MindSpore), .h5 .weights.h5 .keras (Keras). Only weights are converted.
OUT is written if the network read back from it gives the logits of IN; where its format cannot express a property of
IN, nothing is. `--to hub` writes a folder that timm opens as local-dir:OUT and the Hugging Face hub shows.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli, files
from common.errors import UserError
from common.spec import ModelSpec
from tools import models

_FEW = 20  # differing names of a file that was made for a network


def detect(path: str, use_ema: bool | None = None) -> ModelSpec:
    """The ModelSpec of the model that a file fits.

    Args:
      use_ema: see load_model.
    Raises:
      UserError: it fits none.
    """
    from common.weights.load import NonFiniteWeights, OtherWeights, load_model

    errors = list[UserError]()
    for name in models.names():
        spec = models.spec(name)
        try:
            load_model(path, spec, use_ema=use_ema)
            return spec
        except NonFiniteWeights:
            raise
        except UserError as error:
            errors.append(error)
    if len(set(map(str, errors))) == 1:  # the message names no model: the file itself is at fault
        raise errors[0]
    near = [error for error in errors if isinstance(error, OtherWeights) and error.count <= _FEW]
    if near:
        raise min(near, key=lambda error: error.count)
    raise UserError(f"{path}: fits none of {', '.join(models.names())}; --arch NAME lists the differences from one")


def main() -> None:
    names = ",".join(models.names())
    parser = cli.Parser(__doc__)
    parser.add_argument("input", metavar="IN", help="checkpoint to read")
    parser.add_argument("output", metavar="OUT", help="file to write")
    parser.add_argument("--to", choices=("hub",), help="hub: OUT is a folder for timm and the Hugging Face hub")
    parser.add_argument("--arch", metavar=f"{{{names}}}", help="network (default: the one that IN fits)")
    parser.add_argument(
        "--use-ema",
        action=argparse.BooleanOptionalAction,
        help="take the averaged weights (default: where IN has them)",
    )
    options = parser.parse_args()
    spec = models.spec(options.arch) if options.arch else None
    from common.weights import convert

    claimed = files.claimed if options.to == "hub" else files.claimed_file
    if options.to != "hub":
        convert.format_of(pathlib.Path(options.output))
    with claimed(options.output, "OUT"):
        spec = spec or detect(options.input, options.use_ema)
        if options.to == "hub":
            from common.weights import hub

            results = pathlib.Path(__file__).resolve().parents[1] / spec.name / "results.json"
            done = hub.write(options.input, options.output, spec, results, options.use_ema)
        else:
            done = convert.convert(options.input, options.output, spec, options.use_ema)
    for line in (done.taken, *done.notes):
        if line:
            print(line)
    options_text = ", ".join(f"{name} {value}" for name, value in done.build.items())
    print(
        f"{options.output}: {done.target_format} from {done.source_format}, {options_text}; "
        f"logits differ by {done.difference:.1e} of the largest"
    )


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
