"""Quantize an exported ONNX file to int8, and write the result together with its measured loss.

    python tools/quantize.py inception_v3.onnx inception_v3_int8.onnx --data DIR
    python tools/quantize.py inception_v3.onnx inception_v3_int8.onnx --data DIR --agreement-data PHOTOS

Images of DIR/train calibrate, those of DIR/val measure. Nothing is written if top-1 falls by more than --max-drop. An
interrupted run goes on where it was (OUT.work). docs/QUANTIZE.md explains methods and limits.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli
from common.deploy import quantize
from tools import models


def main() -> None:
    parser = cli.parser_for(quantize.QuantizeConfig(), __doc__)
    parser.add_argument("source", metavar="IN", help="float32 .onnx file")
    parser.add_argument("target", metavar="OUT", help="int8 .onnx file to write")
    given = vars(parser.parse_args())
    source, target = given.pop("source"), given.pop("target")
    config = quantize.QuantizeConfig(**given)
    cli.check_required(config)
    quantize.quantize(source, target, config, models.spec)


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
