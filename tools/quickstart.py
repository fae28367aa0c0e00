"""All stages in a few minutes: draw data, train Inception v3, evaluate, export, run the ONNX file, compare, report.

    python tools/quickstart.py

Needs no download, no GPU and no NPU. All files stay below ./demo_output.
"""

import dataclasses
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from any folder

from common import cli, files, processes, run_folder
from tools.report import PREDICTIONS

REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Options of this program."""

    folder: str = cli.option("demo_output", "folder for all output; each run makes a new numbered one in it")
    train_per_class: int = cli.option(100, "training images of each of the ten classes", low=2)
    epochs: int = cli.option(6, "passes over the training images", low=2)
    image_size: int = cli.option(107, "side of the input, pixels", low=75)

    def __post_init__(self) -> None:
        cli.check_ranges(self)


def run(script: str, *options: str | pathlib.Path) -> None:
    """Run a program of this repository and show its output; exit with its status if it fails."""
    words = [str(option) for option in options]
    print(f"\n$ python {script} {' '.join(words)}", flush=True)
    command = [sys.executable, str(ROOT / script), *words]
    done = subprocess.run(command, preexec_fn=processes.ending_with_this(signal.SIGTERM))
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    config, _ = cli.parse(DemoConfig(), __doc__)
    started = time.perf_counter()
    files.check_writable(config.folder, "--folder")
    folder = run_folder.new_run(config.folder)
    data, trained, onnx_file = folder / "data", folder / "run", folder / "inception_v3.onnx"
    run("tools/make_sample_data.py", data, f"--train-per-class={config.train_per_class}")
    run(
        "inception_v3/train.py",
        f"--data={data}",
        f"--output-dir={trained}",
        f"--image-size={config.image_size}",
        f"--epochs={config.epochs}",
        "--recipe=quickstart",
        "--device=cpu",
    )
    run("inception_v3/pthtar2onnx.py", f"--ckpt={trained / run_folder.BEST}", f"--onnx={onnx_file}")
    for engine, model in (("torch", trained / run_folder.BEST), ("onnx", onnx_file)):
        run(
            "inception_v3/eval.py",
            f"--data={data}",
            f"--resume={model}",
            "--device=cpu",
            f"--metrics-json={folder / engine}.json",
            *([f"--predictions={trained / PREDICTIONS}"] if engine == "torch" else []),
        )
    run(
        "inception_v3/demo.py",
        data / "val" / "rings" / "rings_00000.JPEG",
        f"--resume={trained / run_folder.BEST}",
        "--device=cpu",
    )
    if importlib.util.find_spec("vl_convert"):
        run("tools/report.py", trained, f"--out={folder / REPORT}", "--grad-cam", "--mistakes=12")
    print_table(folder, trained, onnx_file, data, time.perf_counter() - started)


def print_table(
    folder: pathlib.Path, trained: pathlib.Path, onnx_file: pathlib.Path, data: pathlib.Path, seconds: float
) -> None:
    """Print accuracies, difference of the engines, throughput and the places of the files."""
    summary = json.loads((trained / "summary.json").read_text())
    rows = [
        ("top-1 on the validation set, torch", top1(folder / "torch.json")),
        ("top-1 on the validation set, ONNX Runtime", top1(folder / "onnx.json")),
        (
            "largest difference of ONNX from torch, of the largest logit",
            f"{largest_difference(trained / run_folder.BEST, onnx_file, data):.1e}",
        ),
        ("training speed", f"{summary['images_per_s']:.1f} images/s on {summary['device']}"),
        ("time in all", f"{seconds:.0f} s"),
        ("checkpoint", trained / run_folder.BEST),
        ("ONNX file", onnx_file),
        ("log and metrics", trained),
        ("report, for a browser", folder / REPORT if (folder / REPORT).exists() else "needs vl-convert-python"),
    ]
    print("\n" + "\n".join(f"{name:60} {value}" for name, value in rows))


def top1(path: pathlib.Path) -> str:
    """Top-1 accuracy of a metrics file."""
    values = {entry["key"]: entry["value"] for entry in json.loads(path.read_text())["value"]}
    return values["Top1 accuracy"]


def largest_difference(checkpoint: pathlib.Path, onnx_file: pathlib.Path, data: pathlib.Path) -> float:
    """Largest difference of a logit over every tenth validation image, as a share of the largest logit."""
    import numpy as np
    import torch

    from common.data import index, transforms
    from common.device.device import Device
    from common.evaluation import engines
    from common.evaluation.torch_classifier import Normalizer, TorchClassifier
    from common.weights.load import load_model
    from inception_v3.spec import SPEC

    model, meta = load_model(checkpoint, SPEC)
    images = index.load_val(str(data), meta["classes"])
    transform = transforms.eval_transform(SPEC, meta["image_size"])
    pixels = np.stack([transform(images.image(i)) for i in range(0, len(images), 10)])
    by_torch = TorchClassifier(model, Normalizer(SPEC, Device("cpu"), "nchw"), Device("cpu"))(torch.from_numpy(pixels))
    by_onnx = engines.EngineClassifier(engines.open_engine(onnx_file), SPEC)(pixels)
    return float(np.abs(by_torch - by_onnx).max() / np.abs(by_torch).max())


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
