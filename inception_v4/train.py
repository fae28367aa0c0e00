"""Train Inception v4 on a folder of images.

    python inception_v4/train.py --data /data/imagenet --epochs 240 --amp

The defaults are one device's share of the published eight-device run (batch 1024, lr 0.484375, cosine over 240 epochs,
label smoothing 0.1): batch 128 and lr 0.0605.
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.config import TrainConfig
from common.train.program import TrainProgram
from inception_v4.spec import SPEC

RECIPE = dataclasses.replace(TrainConfig(), batch_size=128, lr=0.0605)
PROGRAM = TrainProgram(SPEC, RECIPE, __doc__)

if __name__ == "__main__":
    PROGRAM.main()
