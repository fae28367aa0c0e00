"""Baseline of evaluation: decode, preprocess and run an .onnx file in a loop, in one process.

Prints the hits, and the seconds in the network.

python tests/bench/plain_evaluation.py onnxruntime|openvino MODEL FOLDER BATCH_SIZE SIZE
"""

import pathlib
import sys
import time

import numpy as np
from PIL import Image


def load(path, size):
    """Short side to 342 for 299 pixels, center crop, 0.5/0.5 normalization: float32 [3, size, size]."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    short = round(size * 342 / 299)
    image = image.resize([short * side // min(image.size) for side in image.size], Image.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
    return ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)


def engine(name, model):
    if name == "openvino":
        import openvino

        # On a processor with bf16, OpenVINO's default is not float32.
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda batch: compiled(batch)[0]
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {session.get_inputs()[0].name: batch})[0]


def main(name, model, folder, batch_size, size):
    files = sorted(pathlib.Path(folder).glob("*/*"))
    classes = sorted({file.parent.name for file in files})
    run, hits, seconds = engine(name, model), 0, 0.0
    for i in range(0, len(files), int(batch_size)):
        part = files[i : i + int(batch_size)]
        images = np.stack([load(file, int(size)) for file in part])
        started = time.perf_counter()
        logits = run(images)
        seconds += time.perf_counter() - started
        hits += sum(classes[k] == file.parent.name for k, file in zip(logits.argmax(1), part, strict=True))
    print(f"{hits} of {len(files)}, {seconds:.3f} s in the network")


if __name__ == "__main__":
    main(*sys.argv[1:])
