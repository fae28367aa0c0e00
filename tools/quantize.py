"""Quantize an exported ONNX file to int8, and write the result together with its measured loss.

    python tools/quantize.py inception_v3.onnx inception_v3_int8.onnx --data DIR
    python tools/quantize.py inception_v3.onnx inception_v3_int8.onnx --data DIR --agreement-data PHOTOS
    python tools/quantize.py inception_v3.onnx inception_v3_atc.onnx --data DIR --for om

Images of DIR/train calibrate, those of DIR/val measure. Nothing is written if top-1 falls by more than --max-drop. An
interrupted run goes on where it was (OUT.work). --for om calls AMCT, for CANN's atc. docs/QUANTIZE.md
explains methods and limits.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli, files
from common.deploy import om_quantize, quantize
from tools import models


def main() -> None:
    parser = cli.parser_for(quantize.QuantizeConfig(), __doc__)
    parser.add_argument("IN", help="float32 .onnx file")
    parser.add_argument("OUT", help="int8 .onnx file to write")
    given = vars(parser.parse_args())
    source, target = given.pop("IN"), given.pop("OUT")
    config = quantize.QuantizeConfig(**given)
    cli.check_required(config)
    write = om_quantize.quantize_for_om if config.target == "om" else quantize.quantize
    with files.claimed_file(target, "OUT"):  # OUT.work too
        write(source, target, config, models.spec)


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
