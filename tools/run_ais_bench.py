"""Run an OM model on Ascend NPUs with ais_bench.

    python tools/run_ais_bench.py --model inceptionv4_bs8.om --input prep_dataset --output . \\
        --output_dirname result_bs8 --outfmt TXT --batchsize 8
    python tools/run_ais_bench.py --model inceptionv4_bs8.om --batchsize 8 --loop 100
    python tools/run_ais_bench.py --model inceptionv4.onnx --sweep 1,4,8,16,32,64

The first runs over a data set, the second measures the network alone, the third converts and measures batch sizes.
tools/run_onnx.py does the same on a machine without NPU.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import ais_bench

if __name__ == "__main__":
    ais_bench.main(__doc__)
