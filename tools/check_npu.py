"""Preflight checks of this machine: Python, torch, CANN, driver, cards, ports, memory, data, disk.

    python tools/check_npu.py --device npu --devices 8 --data /data/imagenet

One line per check, with a remedy if it FAILs. Exit status 0 if all pass, else 1. Also for NVIDIA GPUs and CPUs:
`--device cuda`, `--device cpu`.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from common.launch import preflight

if __name__ == "__main__":
    preflight.main(__doc__)
