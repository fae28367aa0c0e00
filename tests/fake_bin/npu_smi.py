"""Stands in for npu-smi: prints the file FAKE_NPU_SMI/{info,board}.txt; without that variable the driver is dead."""

import os
import pathlib
import sys

folder = os.environ.get("FAKE_NPU_SMI")
if not folder:
    print("dcmi module initialize failed. ret is -8005")
    sys.exit(1)
print((pathlib.Path(folder) / ("board.txt" if "board" in sys.argv else "info.txt")).read_text())
