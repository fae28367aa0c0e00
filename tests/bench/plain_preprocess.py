"""Baseline of preprocess.py: one process, one image after the other, the published arithmetic in PIL and NumPy.

python tests/bench/plain_preprocess.py SRC_FOLDER SAVE_FOLDER
"""

import os
import sys

import numpy as np
from PIL import Image


def preprocess(path):
    """342 bilinear, 299 center with floor offsets, (x/255 - 0.5) / 0.5, CHW float32."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    short, long = min(width, height), int(342 * max(width, height) / min(width, height))
    if short != 342:
        image = image.resize((342, long) if width == short else (long, 342), Image.BILINEAR)
    pixels = np.array(image, dtype=np.float32)
    top, left = int((pixels.shape[0] - 299) / 2), int((pixels.shape[1] - 299) / 2)
    pixels = pixels[top : top + 299, left : left + 299]
    pixels = (pixels / 255 - np.array([0.5, 0.5, 0.5], np.float32)) / np.array([0.5, 0.5, 0.5], np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def main(source, target):
    os.makedirs(target, exist_ok=True)  # noqa: PTH103
    for name in sorted(os.listdir(source)):  # noqa: PTH208
        preprocess(f"{source}/{name}").tofile(f"{target}/{name.split('.')[0]}.bin")


if __name__ == "__main__":
    main(*sys.argv[1:])
