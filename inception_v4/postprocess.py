"""Score the result files of Inception v4: top-1 to top-5 accuracy.

    python inception_v4/postprocess.py --infer_results result_bs8 --anno_file imageNet/val_label.txt \\
        --metrics_json metrics.json

Reads TXT, NPY or BIN results of 1000 columns, or of 1001 where the first is a background class.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.deploy import postprocess
from inception_v4.spec import SPEC

if __name__ == "__main__":
    postprocess.main(SPEC, __doc__)
