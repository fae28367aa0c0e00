"""Largest difference from PyTorch of every exported form in every engine, as a share of the largest logit.

    python tests/bench/check_exports.py

Each network has random weights with calibrated batch norms and 75 x 75 pixels. Prints the table of docs/QUANTIZE.md.
"""

import pathlib
import sys
import tempfile
import warnings

import numpy as np
import onnx
import openvino

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from support import SIZE, calibrated, closed_form_image

from common.deploy import export
from common.evaluation import engines
from tools import models

FORMS = (*((opset, {}) for opset in (11, 13, 17, 18)), *((opset, {"simplify": True}) for opset in (11, 13, 17, 18)))


def main():
    warnings.simplefilter("ignore")
    print("| Network | Form | onnx.checker | ONNX Runtime | OpenVINO float32 | OpenVINO default |")
    print("|---|---|---|---|---|---|")
    for name in models.names():
        spec = models.spec(name)
        smooth = closed_form_image(SIZE)[0]
        images = np.stack([smooth, 0.7 * smooth[:, ::-1], 0 * smooth, smooth.transpose(0, 2, 1)]).astype(np.float32)
        model = calibrated(spec.num_classes, images, spec).eval()
        with torch.inference_mode():
            expected = model(torch.from_numpy(images)).numpy()
        for opset, options in (*FORMS, (11, {"precision": "float16"}), (17, {"precision": "float16"})):
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "net.onnx"
                export.export_onnx(model, spec, path, SIZE, opset=opset, **options)
                onnx.checker.check_model(onnx.load(path), full_check=True)
                found = [engines.OnnxEngine(path).run(images)]
                for hint in ({"INFERENCE_PRECISION_HINT": "f32"}, {}):
                    found.append(openvino.Core().compile_model(path, "CPU", hint)(images)[0])
            shares = [f"{np.abs(each - expected).max() / np.abs(expected).max():.1e}" for each in found]
            form = (
                f"opset {opset}{', onnxslim' if 'simplify' in options else ''} {options.get('precision', '')}".strip()
            )
            print(f"| {name} | {form} | accepted | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
