"""Print the five most probable classes of photographs, with Xception.

    python xception/demo.py photo.jpg
    python xception/demo.py folder/ --resume gpu-ckpt/Xception-rank0-250_2502.ckpt
    python xception/demo.py photo.jpg --resume xception.onnx --class-names class_index.json

Without --resume it takes the newest checkpoint in ./ckpt_0 or ./gpu-ckpt.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.evaluation import predict
from xception.src.config import SPEC
from xception.src.run_log import newest_checkpoint

if __name__ == "__main__":
    predict.main(SPEC, __doc__, default_checkpoint=newest_checkpoint, validation_option="eval_path")
