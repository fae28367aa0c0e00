"""Check what a training needs of this machine: Python, torch, CANN, driver, cards, ports, memory, data, disk.

    python tools/check_npu.py --device npu --devices 8 --data /data/imagenet

One line for each need, with a remedy where it FAILs. Exit status 0 when all is well, else 1. Works for NVIDIA GPUs and
CPUs too: `--device cuda`, `--device cpu`.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from common.launch import preflight

if __name__ == "__main__":
    preflight.main(__doc__)
