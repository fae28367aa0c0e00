"""Convert weights between the formats of PyTorch, timm, Cadene, MindSpore, Keras and this zoo.

    python tools/convert_weights.py xception.ckpt xception.pth.tar
    python tools/convert_weights.py gpu-ckpt/Xception-rank0-250_2502.ckpt official.ckpt

What IN is, its content says; what OUT becomes, its name says: .pth.tar (this zoo's checkpoint), .pth .pt .safetensors
(timm, Cadene, torchvision), .ckpt (MindSpore), .h5 (Keras). Weights only: the optimizer's state stays behind. OUT is
written when a network read from it gives the logits of IN, and not at all where its format cannot say what IN is.
"""

import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli
from common.errors import UserError

SPECS = {"inception_v3": "inception_v3.spec", "inception_v4": "inception_v4.spec", "xception": "xception.src.config"}


def spec_of(arch):
    return importlib.import_module(SPECS[arch]).SPEC


def detect(path):
    """ModelSpec of the model that a file fits; UserError where there is none."""
    from common.weights.load import load_model

    reasons = []
    for arch in SPECS:
        try:
            load_model(path, spec_of(arch))
            return spec_of(arch)
        except UserError as error:
            reasons.append(str(error))
    if len(set(reasons)) == 1:  # no word about a model: the file itself is at fault
        raise UserError(reasons[0])
    raise UserError(f"{path}: fits none of {', '.join(SPECS)}; --arch NAME lists the differences from one")


def main():
    parser = cli.Parser(__doc__)
    parser.add_argument("input", metavar="IN", help="checkpoint to read")
    parser.add_argument("output", metavar="OUT", help="file to write")
    parser.add_argument("--arch", metavar="{" + ",".join(SPECS) + "}", help="network (default: the one that IN fits)")
    options = parser.parse_args()
    if options.arch and options.arch not in SPECS:
        raise UserError(f"--arch: {options.arch}, must be one of {', '.join(SPECS)}")
    from common.weights import convert

    convert.format_of(pathlib.Path(options.output))
    spec = spec_of(options.arch) if options.arch else detect(options.input)
    done = convert.convert(options.input, options.output, spec)
    options_text = ", ".join(f"{name} {value}" for name, value in done.build.items())
    print(
        f"{options.output}: {done.target_format} from {done.source_format}, {options_text}; "
        f"logits differ by {done.difference:.1e} of the largest"
    )


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
