"""Top-1 to top-5 accuracy of Inception v3, straight from the images.

    python inception_v3/eval.py --data /data/imagenet --resume model_best.pth.tar

The data folder holds val/ with class folders, or val/ with images beside val_label.txt. A checkpoint runs in PyTorch,
an .onnx file in ONNX Runtime, an .om file on an Ascend NPU. Every image counts exactly once.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.evaluation import program
from inception_v3.spec import SPEC

if __name__ == "__main__":
    program.main(SPEC, __doc__)
