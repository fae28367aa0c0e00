"""Convert images to the input files of Xception.

    python xception/preprocess.py --src_path imageNet/val --save_path prep_dataset

The images must lie in one folder, beside which postprocess.py needs their label file: class folders are not searched.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import preprocess
from xception.src.config import SPEC

if __name__ == "__main__":
    preprocess.main(SPEC, __doc__)
