"""Top-1 to top-5 accuracy of Inception v4, straight from the images.

    python inception_v4/eval.py --data imageNet --resume inceptionv4-8e4777a0.pth
    python inception_v4/eval.py --data imageNet --resume inceptionv4.onnx

The data folder holds val/ with class folders, or val/ with images beside val_label.txt. A checkpoint runs in PyTorch,
an .onnx file in ONNX Runtime, an .om file on an Ascend NPU. No input files are written, which would take 53.6 GB for
ImageNet's validation set.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.evaluation import program
from inception_v4.spec import SPEC

if __name__ == "__main__":
    program.main(SPEC, __doc__)
