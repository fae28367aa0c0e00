"""Train Inception v3 on a folder of images.

    python inception_v3/train.py --data /data/imagenet --epochs 240 --amp

The defaults are the one-device recipe in inception_v3/recipes.py: batch 256, lr 0.045 falling as a cosine over 240
epochs, weight decay 2e-4, label smoothing 0.1, loss = main + 0.4 x auxiliary.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.train.program import TrainProgram
from inception_v3.recipes import RECIPES
from inception_v3.spec import SPEC

PROGRAM = TrainProgram(SPEC, RECIPES, __doc__)

if __name__ == "__main__":
    PROGRAM.main()
