"""Score the result files of Xception: top-1 to top-5 accuracy.

    python xception/postprocess.py --infer_results result_bs8 --anno_file imageNet/val_label.txt \\
        --metrics_json metrics.json

Reads TXT, NPY or BIN results with 1000 columns, or as many as --num-classes says.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import postprocess
from xception.src.config import SPEC

if __name__ == "__main__":
    postprocess.main(SPEC, __doc__)
