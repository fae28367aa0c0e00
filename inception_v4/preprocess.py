"""Turn images into the input files of the Inception v4 network.

    python inception_v4/preprocess.py --src_path imageNet/val --save_path prep_dataset

Writes one float32 CHW 3x299x299 file (1,072,812 bytes) per image, or with --dtype uint8 one HWC file (268,203 bytes)
for a model that was converted with AIPP. A second run converts only what is missing or has changed.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import preprocess
from inception_v4.spec import SPEC

if __name__ == "__main__":
    preprocess.main(SPEC, __doc__)
