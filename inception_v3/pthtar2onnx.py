"""Turn an Inception v3 checkpoint into an ONNX file.

    python inception_v3/pthtar2onnx.py
    python inception_v3/pthtar2onnx.py --ckpt model_best.pth.tar --onnx inception_v3.onnx --batch dynamic

Without --ckpt it takes ./model_best.pth.tar, else that of the newest run below ./output. The file is checked by
onnx.checker and compared with torch on ONNX Runtime before it gets its name.
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import run_folder
from common.deploy import export
from inception_v3.spec import SPEC

RECIPE = dataclasses.replace(export.ExportConfig(), onnx="inception_v3.onnx")

if __name__ == "__main__":
    export.main(SPEC, __doc__, RECIPE, default_checkpoint=run_folder.newest_best)
