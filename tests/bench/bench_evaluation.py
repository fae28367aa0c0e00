"""Evaluation of Inception v4 on the CPU, command to counts, compared with plain loops over an .onnx file (A B A B).

    python tests/bench/bench_evaluation.py --photos FOLDER --images 120

The baseline is the faster of ONNX Runtime and OpenVINO in float32, each in a loop of one process that decodes,
preprocesses and runs batches of 16. The zoo's side is eval.py with the .onnx file and with the checkpoint, by default,
with --engine auto and with --fast, and with an int8 file that tools/quantize.py made of the .onnx file. The last layer
of a random network is fitted to half of the images, so that hits depend on the images. The first round fills the
caches, the choice of engines and the converted checkpoint among them, and is not counted. Hits must be those of the
baseline, except with --fast and int8.

Each row also notes the limit: the time that the convolutions of all images alone take at the highest rate that one
convolution of the network reaches on this machine, on all cores.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import record
from PIL import Image

ROOT, BATCH, CLASSES = record.ROOT, 16, 10
GFLOP_OF_IMAGE = 24.5  # convolutions of Inception v4 at 299 pixels


def make_images(folder, num_images, photos):
    """JPEG files in ten class folders below val/ and, for calibration, train/: photographs, or drawn ones."""
    files = sorted(path for path in pathlib.Path(photos).rglob("*") if path.is_file()) if photos else []
    if photos and len(files) < num_images:
        raise SystemExit(f"--photos: {photos} holds {len(files)} files, not {num_images}")
    for i in range(num_images):
        name = pathlib.Path(f"{folder}/val/{i % CLASSES}/{i:04d}.jpg")
        name.parent.mkdir(parents=True, exist_ok=True)
        if files:
            name.write_bytes(files[i].read_bytes())
        else:
            noise = Image.effect_noise((500, 375), 20 + i % 80)
            planes = [noise, noise.transpose(Image.FLIP_LEFT_RIGHT), noise.rotate(180)]
            Image.merge("RGB", planes).save(name, quality=90)
    for name in sorted(pathlib.Path(folder, "val").glob("*/*"))[:: max(1, num_images // 32)]:
        target = pathlib.Path(folder, "train", name.parent.name, name.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(name)


def make_network(folder, size):
    """net.pth and net.onnx, whose last layer separates every other image of val/."""
    import torch

    from common.data import index
    from common.data.transforms import eval_transform
    from common.deploy import export
    from inception_v4.spec import SPEC

    torch.manual_seed(0)
    options = {**SPEC.build_options, "num_classes": CLASSES}
    network = SPEC.build(**options).train()
    images, transform = index.load_folder(f"{folder}/val"), eval_transform(SPEC, size)
    pixels = np.stack([transform(images.image(i)) for i in range(len(images))])
    inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    features = []
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the mean of the batches that it has seen
        network(inputs[:: max(1, len(inputs) // 16)])
        handle = network.last_linear.register_forward_pre_hook(lambda module, given: features.append(given[0]))
        for part in inputs.split(BATCH):
            network.eval()(part)
        handle.remove()
        found = torch.cat(features)
        mean, scale = found.mean(0), found.std(0) + 1e-3
        known = ((found - mean) / scale)[::2]
        targets = 10 * torch.nn.functional.one_hot(torch.tensor(images.labels[::2]).long(), CLASSES).float()
        weights = known.T @ torch.linalg.solve(known @ known.T + torch.eye(len(known)), targets) / scale[:, None]
        network.last_linear.weight.copy_(weights.T)
        network.last_linear.bias.copy_(-mean @ weights)
    state = dict(arch=SPEC.name, state_dict=network.state_dict(), build=options, image_size=size)
    torch.save({**state, "classes": [str(i) for i in range(CLASSES)]}, f"{folder}/net.pth")
    export.export(SPEC, export.ExportConfig(ckpt=f"{folder}/net.pth", onnx=f"{folder}/net.onnx"))


def convolution_rate():
    """Gflop/s of the fastest of three convolutions of the network in ONNX Runtime, on all cores."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    best = 0.0
    for inputs, outputs, side in ((96, 96, 35), (224, 256, 17), (64, 96, 71)):
        weights = numpy_helper.from_array(np.ones((outputs, inputs, 3, 3), np.float32), "w")
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, channels, side, side])
            for name, channels in (("x", inputs), ("y", outputs))
        ]
        node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
        graph = helper.make_graph([node], "graph", values[:1], values[1:], [weights])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        pixels = np.ones((BATCH, inputs, side, side), np.float32)
        for _ in range(20):
            start = time.perf_counter()
            session.run(None, {"x": pixels})
            seconds = time.perf_counter() - start
            best = max(best, 2e-9 * BATCH * inputs * outputs * 9 * side * side / seconds)
    return best


def run(command, cache):
    """(seconds, hits) of a command."""
    started = time.perf_counter()
    env = {**os.environ, "XDG_CACHE_HOME": cache}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    seconds = time.perf_counter() - started
    found = re.search(r"(?:^|\()(\d+) of \d+", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return seconds, int(found[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--image-size", type=int, default=299)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", metavar="FOLDER", help="images of any folder; default: drawn ones of 500 x 375")
    parser.add_argument("--only", metavar="PATTERN", default="", help="the commands that match, and the baselines")
    parser.add_argument("--note", default="", help="on the state of the machine, for the rows")
    record.add_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make_images(scratch, args.images, args.photos)
        make_network(scratch, args.image_size)
        plain = [sys.executable, str(ROOT / "tests/bench/plain_evaluation.py")]
        zoo = [sys.executable, str(ROOT / "inception_v4/eval.py"), "--device=cpu", f"--data={scratch}", f"-b={BATCH}"]
        commands = {
            f"plain {name}": [*plain, name, f"{scratch}/net.onnx", f"{scratch}/val", str(BATCH), str(args.image_size)]
            for name in ("onnxruntime", "openvino")
        }
        ways = [(kind, options) for kind in ("onnx", "pth") for options in ([], ["--engine=auto"], ["--fast"])]
        for kind, options in [*ways, ("int8.onnx", []), ("int8.onnx", ["--fast"])]:
            name = " ".join(["eval.py", f".{kind}", *options])
            if re.search(args.only, name):
                commands[name] = [*zoo, f"--resume={scratch}/net.{kind}", *options]
        if any("int8" in name for name in commands):
            limits = ["--max-drop=100", "--images=32"]
            quantize = [sys.executable, str(ROOT / "tools/quantize.py"), f"{scratch}/net.onnx"]
            command = [*quantize, f"{scratch}/net.int8.onnx", f"--data={scratch}", *limits]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found, rate = {name: [] for name in commands}, convolution_rate()
        for _ in range(args.rounds + 1):
            for name, command in commands.items():
                found[name].append(run(command, f"{scratch}/cache"))
                print(f"{name:32}{found[name][-1][0]:8.2f} s  {found[name][-1][1]} hits", flush=True)
            rate = max(rate, convolution_rate())
    best = [
        min(found[f"plain {name}"][i][0] for name in ("onnxruntime", "openvino")) for i in range(1, args.rounds + 1)
    ]
    limit = args.images * GFLOP_OF_IMAGE * (args.image_size / 299) ** 2 / rate
    print(f"convolutions alone: {limit:.2f} s at {rate:.0f} Gflop/s; the plain loop: {statistics.median(best):.2f} s")
    hits = found["plain onnxruntime"][0][1]
    for name in list(commands)[2:]:
        is_exact = "--fast" not in name and "int8" not in name
        assert not is_exact or {found_hits for _, found_hits in found[name]} == {hits}, name
        seconds = [seconds for seconds, _ in found[name][1:]]
        ratios = [b / own for b, own in zip(best, seconds, strict=True)]
        print(f"{name:32} ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        kind = "photographs" if args.photos else "images of 500 x 375"
        what = f"{name} of Inception v4, {args.images} {kind}, command to counts"
        against = "the faster of ONNX Runtime and OpenVINO (float32) in a plain loop"
        note = f"{found[name][-1][1]} hits, the plain loop {hits}; {statistics.median(seconds):.1f} s"
        if "int8" not in name:
            share = 100 * limit / statistics.median(seconds)
            note += f", of which float32 convolutions alone at {rate:.0f} Gflop/s: {limit:.1f} s, {share:.0f} %"
        note += f"; {args.note}" if args.note else ""
        record.record(args.record, "evaluation", what, against, **record.compared(ratios), note=note)


if __name__ == "__main__":
    main()
