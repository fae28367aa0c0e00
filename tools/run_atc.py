"""Convert an ONNX model to OM files for Ascend NPUs.

    python tools/run_atc.py --model inceptionv4.onnx --batch 1,4,8,16,32,64 --soc-version Ascend310P3

Needs CANN's atc, but no NPU. --dry-run checks everything and prints the commands, on any machine.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import atc
from tools import models

if __name__ == "__main__":
    atc.main(__doc__, models.spec)
