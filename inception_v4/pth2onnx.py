"""Export Inception v4 weights to ONNX.

    python inception_v4/pth2onnx.py --ckpt inceptionv4-8e4777a0.pth --onnx inceptionv4.onnx

Reads the public files (Cadene, timm) and checkpoints of this repository; without --ckpt it downloads the public file.
The public weights have 1001 columns, the first for a background class; --num-classes 1000 cuts it off.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import export
from inception_v4.spec import SPEC

if __name__ == "__main__":
    export.main(SPEC, __doc__)
