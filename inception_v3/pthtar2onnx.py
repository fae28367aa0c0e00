"""Export an Inception v3 checkpoint to ONNX.

    python inception_v3/pthtar2onnx.py
    python inception_v3/pthtar2onnx.py --ckpt model_best.pth.tar --onnx inception_v3.onnx --batch dynamic

Without --ckpt it takes ./model_best.pth.tar, else that of the newest run below ./output. The file is written only if
onnx.checker accepts it and its logits in ONNX Runtime are those of PyTorch.
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import run_folder
from common.deploy import export
from inception_v3.spec import SPEC

DEFAULTS = dataclasses.replace(export.ExportConfig(), onnx="inception_v3.onnx")

if __name__ == "__main__":
    export.main(SPEC, __doc__, DEFAULTS, default_checkpoint=lambda: run_folder.newest_best(SPEC.name))
