"""Convert images to the input files of Inception v4.

    python inception_v4/preprocess.py --src_path imageNet/val --save_path prep_dataset
    python inception_v4/preprocess.py --src_path imageNet/val --save_path prep_uint8 --dtype uint8

The second command is for a model that was converted with AIPP, which normalizes on the device.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import preprocess
from inception_v4.spec import SPEC

if __name__ == "__main__":
    preprocess.main(SPEC, __doc__)
