"""Run an ONNX model as ais_bench runs an OM model: same options, same result files, on ONNX Runtime.

    python tools/run_onnx.py --model inceptionv4.onnx --input prep_dataset --output . --output_dirname result_bs8 \\
        --outfmt TXT --batchsize 8

Without --input it measures the network alone: --batchsize 8 --loop 20. With --simulate-fp16 it prints what float16
on the device does to each layer.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import onnx_runtime

if __name__ == "__main__":
    onnx_runtime.main(__doc__)
