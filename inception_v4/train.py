"""Train Inception v4 on a folder of images.

    python inception_v4/train.py --data /data/imagenet --epochs 240 --amp

The defaults are the recipe in inception_v4/recipes.py: batch 128, lr 0.0605.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.train.program import TrainProgram
from inception_v4.recipes import RECIPES
from inception_v4.spec import SPEC

PROGRAM = TrainProgram(SPEC, RECIPES, __doc__)

if __name__ == "__main__":
    PROGRAM.main()
