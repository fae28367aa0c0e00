"""Shared by the deployment tests: images, a network whose answers differ, and the stand-ins on the PATH."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[n]) for n in (1, 2)]

from support import ROOT as REPO
from support import forked

FAKE_BIN = REPO / "tests" / "fake_bin"
SIZE = 75  # the smallest input Inception v4 takes: a forward pass of 15 ms
REAL_IMAGES = REPO.parent / "shared" / "data" / "imagenet300"


def plain_pixels(path, size=SIZE):
    """The published transform, written down a second time: resize 342/299 of `size`, floor offsets -> uint8 HWC."""
    image = Image.open(path).convert("RGB")
    short = round(342 * size / 299)
    width, height = image.size
    if min(width, height) != short:
        scaled = int(short * max(width, height) / min(width, height))
        image = image.resize((short, scaled) if width <= height else (scaled, short), Image.BILINEAR)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def plain_input(path, size=SIZE):
    """float32 CHW of one image, (x/255 - 0.5) / 0.5."""
    pixels = plain_pixels(path, size).astype(np.float32)
    half = np.float32(0.5)
    return ((pixels / np.float32(255) - half) / half).transpose(2, 0, 1)


def run_script(script, *arguments, env=None, cwd=None):
    """Start a script of the repository; returns the finished process with its output as text."""
    command, environment = [str(REPO / script), *map(str, arguments)], os.environ | {"OMP_NUM_THREADS": "1"}
    if env is None:
        return forked(command, cwd or os.getcwd(), environment, timeout=600)
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
        check=False,
        env=environment | env,
    )


def run_ok(script, *arguments, **more):
    """What a script that must succeed prints."""
    done = run_script(script, *arguments, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hits_printed(output):
    """The counts of the printed table."""
    return [int(line.split("(")[1].split()[0]) for line in output.splitlines() if line.startswith("top")]


def fails(done, *words):
    """Assert exit status 2 and one line `error: ...` with these words."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stdout + done.stderr
    for word in words:
        assert word in lines[0], lines[0]


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


def calibrated(num_classes, inputs_NCHW):
    """Inception v4 with random weights whose answers differ from image to image, and do not amplify rounding.

    Batch-norm statistics of the images alone leave a chaotic network: the last bit of a pixel moves logits by 1 %. Widening
    the small variances tames it, and centring the logits brings the differences between images back to the front.
    """
    import torch

    from inception_v4.spec import SPEC

    torch.manual_seed(num_classes)
    model, images = SPEC.build(num_classes=num_classes, dropout=0.0), torch.from_numpy(inputs_NCHW)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
        for norm in norms:
            norm.running_var.clamp_(min=float(norm.running_var.mean()) * 1.4)
        logits = model.eval()(images)
        scale = 3 / (logits - logits.mean(0)).std()
        model.last_linear.weight.mul_(scale)
        model.last_linear.bias.sub_(logits.mean(0)).mul_(scale)
    return model


def labels_at_ranks(logits_NK, background):
    """A class for each image that lies at rank 1, 2, .. 6, 1, .. of its row, clear of its neighbors.

    Returns:
      (labels counted from 0 without the background column, expected hits at top-1..top-5).
    """
    labels, hits = [], np.zeros(5, int)
    for i, row in enumerate(logits_NK):
        order = np.argsort(-row, kind="stable")
        rank = i % 6
        while order[rank] < background or min(abs(np.diff(row[order[max(0, rank - 1) : rank + 2]]))) < 2e-2:
            rank += 1  # too near to the next one for another engine's rounding, or not a class
        labels.append(int(order[rank]) - background)
        hits += np.arange(1, 6) > rank
    return labels, hits


@pytest.fixture(scope="session")
def fake_tools(tmp_path_factory):
    """Environment in which atc, npu-smi and ais_bench are the stand-ins."""
    folder = tmp_path_factory.mktemp("bin")
    for name, script in (("atc", "atc.py"), ("npu-smi", "npu_smi.py")):
        launcher = folder / name
        launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE_BIN / script}" "$@"\n')
        launcher.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(FAKE_BIN / "site")}


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
