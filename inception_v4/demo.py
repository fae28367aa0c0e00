"""Print the five most probable classes of photographs, with Inception v4.

    python inception_v4/demo.py photo.jpg folder/ --resume inceptionv4-8e4777a0.pth
    python inception_v4/demo.py photo.jpg --resume inceptionv4.om --class-names class_index.json

Without --resume it takes ./model_best.pth.tar, else that of the newest run below ./output.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.evaluation import predict
from inception_v4.spec import SPEC

if __name__ == "__main__":
    predict.main(SPEC, __doc__)
