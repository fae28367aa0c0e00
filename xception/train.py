"""Train Xception on a folder of class folders.

    python xception/train.py --device_target Ascend --dataset_path /dataset/train
    python xception/train.py --device_target GPU --dataset_path /dataset/train

The defaults are the MindSpore package's: 250 epochs, batch 128 (Ascend) or 64 per device, lr up to 0.4 in one epoch and
down to 0.00004 on a line, weight decay 1e-4 without batch norm, label smoothing 0.1, loss scale 1024. Checkpoints go to
./ckpt_0 (Ascend) or ./gpu-ckpt, lines also to log.txt or log_gpu.txt.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from xception.src.program import XceptionProgram

PROGRAM = XceptionProgram(__doc__)

if __name__ == "__main__":
    PROGRAM.main()
