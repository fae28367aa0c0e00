"""Convert images to the input files of Inception v3.

    python inception_v3/preprocess.py --src_path imageNet/val --save_path prep_dataset

A second run converts only what is missing or has changed.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import preprocess
from inception_v3.spec import SPEC

if __name__ == "__main__":
    preprocess.main(SPEC, __doc__)
