"""Print the five most probable classes of photographs, with Inception v3.

    python inception_v3/demo.py photo.jpg
    python inception_v3/demo.py
    python inception_v3/demo.py folder/ --resume model_best.pth.tar
    python inception_v3/demo.py photo.jpg --resume inception_v3.onnx --class-names class_index.json

Without --resume it takes ./model_best.pth.tar, else that of the newest run below ./output.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.evaluation import predict
from inception_v3.spec import SPEC

if __name__ == "__main__":
    predict.main(SPEC, __doc__)
