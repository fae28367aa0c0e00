"""Compare two models on the same images: accuracy, agreement, and the mistake that explains a difference.

    python tools/compare.py inceptionv4-8e4777a0.pth inceptionv4.onnx --data imageNet
    python tools/compare.py inceptionv4.onnx inceptionv4_int8.onnx --data imageNet --max-drop 0.5 --min-agreement 99
    python tools/compare.py inceptionv4.onnx result_bs8 --data imageNet --changes changes.csv

A and B are checkpoints, .onnx or .om files, folders of result files, or networks of other packages with their own
transforms and weights: torchvision:inception_v3, timm:inception_v4, or with a file of weights timm:inception_v4=FILE.
Where they differ by more than rounding, known mistakes of conversions are tried on a sample of the images: color order,
normalization, crop, layout, EXIF, order and shift of the columns, a forgotten eval(). --max-drop and --min-agreement
make it a gate, with exit status 1.
"""

import contextlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli, files
from common.deploy import compare, reference_models
from common.errors import UserError
from common.spec import ModelSpec
from tools import models
from tools.convert_weights import detect


def spec_of(argument: str, arch: str) -> ModelSpec | None:
    """The network of a file; None where the file does not say it.

    Raises:
      UserError: the file does not exist, or --arch is no network.
    """
    path = pathlib.Path(argument)
    if argument.startswith(reference_models.PREFIXES):
        return None
    if not path.exists():
        raise UserError(f"{argument}: does not exist; give a model file, a folder of results, or timm:NAME")
    if path.suffix == ".onnx":
        from common.evaluation.engines import OnnxEngine

        name = OnnxEngine(path).metadata.get("arch", "")
        if name in models.names():
            return models.spec(name)
    if arch:
        return models.spec(arch)
    return None if path.is_dir() or path.suffix in (".onnx", ".om") else detect(argument)


def main() -> None:
    parser = cli.parser_for(compare.CompareConfig(), __doc__)
    parser.add_argument("a", metavar="A", help="the reference")
    parser.add_argument("b", metavar="B", help="what is compared with it")
    given = vars(parser.parse_args())
    a, b = given.pop("a"), given.pop("b")
    config = compare.CompareConfig(**given)
    cli.check_required(config)
    root = pathlib.Path(config.data)
    labels = (root if (root / "val").is_dir() else root.parent) / "val_label.txt"
    with contextlib.ExitStack() as stack:
        for path, flag in ((config.changes, "--changes"), (config.json, "--json")):
            if path:
                files.check_distinct(path, flag, {"A": a, "B": b, "the label file": labels})
                stack.enter_context(files.claimed_file(path, flag))
        compare.main(a, b, config, lambda argument: spec_of(argument, config.arch))


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
