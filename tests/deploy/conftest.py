"""Fixtures of the deployment tests: images, the stand-ins of Ascend's programs, a network and its files."""

import os
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from support import FAKE_BIN, SIZE, calibrated, front_end_path, labels_at_ranks, plain_input, run_script


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 images of different content and size, with ImageNet's odd files among them, and no label file."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(7)
    for i in range(24):
        width, height = (int(side) for side in rng.integers(90, 260, 2))
        image = Image.new("RGB", (width, height), tuple(int(c) for c in rng.integers(0, 256, 3)))
        draw = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(2, 12))):
            x, y = (int(side) for side in rng.integers(0, 200, 2))
            draw.ellipse(
                (x, y, x + int(rng.integers(10, 120)), y + int(rng.integers(10, 120))),
                fill=tuple(int(c) for c in rng.integers(0, 256, 3)),
            )
        name = folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG"
        exif = Image.Exif()
        exif[0x0112] = 6  # "turn it": to be ignored
        if i == 3:
            image.convert("CMYK").save(name, "JPEG")
        elif i == 5:
            image.convert("L").save(name, "JPEG")
        elif i == 8:
            image.save(name, "PNG")
        elif i == 10:
            image.save(name, "JPEG", exif=exif)
        else:
            image.save(name, "JPEG", quality=90)
    return folder


@pytest.fixture(scope="session")
def fake_tools(tmp_path_factory):
    """Environment in which atc, npu-smi and ais_bench (the front end of 2023) are the stand-ins."""
    folder = tmp_path_factory.mktemp("bin")
    for name, script in (("atc", "atc.py"), ("npu-smi", "npu_smi.py")):
        launcher = folder / name
        launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE_BIN / script}" "$@"\n')
        launcher.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": front_end_path("2023")}


@pytest.fixture(scope="session")
def chain(photos, tmp_path_factory):
    """A checkpoint with a background class, its ONNX file, torch's own logits, and label files for both class counts."""
    import torch

    from common.deploy import export
    from common.weights.load import load_model
    from inception_v4.spec import SPEC

    folder = tmp_path_factory.mktemp("chain")
    files = sorted(photos.iterdir())
    inputs = np.stack([plain_input(path) for path in files])
    model = calibrated(1001, inputs)
    torch.save(model.state_dict(), folder / "public.pth")
    with torch.inference_mode():
        logits = model(torch.from_numpy(inputs)).numpy()
    assert len(set(logits.argmax(axis=1))) > 20  # a network that gives all images one class would prove nothing
    found = {
        "photos": photos,
        "folder": folder,
        "files": files,
        "ckpt": folder / "public.pth",
        "model": model,
        "inputs": inputs,
        "logits": logits,
        "data": folder / "data",
    }
    for columns, background in ((1001, 1), (1000, 0)):
        labels, hits = labels_at_ranks(logits[:, 1 - background :], background)
        data = folder / f"data{columns}"
        data.mkdir()
        (data / "val").symlink_to(photos)
        (data / "val_label.txt").write_text(
            "".join(f"{path.name} {label}\n" for path, label in zip(files, labels, strict=True))
        )
        onnx_file = folder / f"net{columns}.onnx"
        if columns == 1001:
            done = run_script(
                "inception_v4/pth2onnx.py", "--ckpt", found["ckpt"], "--onnx", onnx_file, "--image-size", SIZE
            )
            assert done.returncode == 0, done.stderr
        else:
            export.export_onnx(load_model(found["ckpt"], SPEC, num_classes=1000)[0], SPEC, onnx_file, SIZE)
        found[columns] = {"data": data, "labels": data / "val_label.txt", "hits": hits, "onnx": onnx_file}
    return found
