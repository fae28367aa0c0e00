"""Evaluation of Inception v4 on the CPU, command to counts, compared with plain loops over an .onnx file (A B A B).

    python tests/bench/bench_evaluation.py --images 120

The baseline is the faster of ONNX Runtime and OpenVINO in float32, each in a loop of one process that decodes,
preprocesses and runs batches of 16. The zoo's side is eval.py with the .onnx file and with the checkpoint, by default,
with --engine auto and with --fast. Weights are random, images drawn. The first round fills the caches, the choice of
engines among them, and is not counted. Hits must be those of the baseline, except with --fast. The limit is the time
that the faster engine of the baseline spends in the network.
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

import record
from PIL import Image

ROOT, BATCH = record.ROOT, 16


def make(folder, num_images, size):
    """net.pth, net.onnx, and photograph-like JPEG files in ten class folders below val/."""
    import torch

    from common.deploy import export
    from inception_v4.spec import SPEC

    torch.manual_seed(0)
    options = {**SPEC.build_options, "num_classes": 10}
    network = SPEC.build(**options).train()
    with torch.no_grad():
        for _ in range(4):  # statistics of batch norm, so that logits are of ordinary size
            network(torch.rand(4, 3, 107, 107) * 2 - 1)
    state = dict(arch=SPEC.name, state_dict=network.state_dict(), build=options, image_size=size)
    torch.save({**state, "classes": [str(i) for i in range(10)]}, f"{folder}/net.pth")
    export.export(SPEC, export.ExportConfig(ckpt=f"{folder}/net.pth", onnx=f"{folder}/net.onnx"))
    for i in range(num_images):
        name = pathlib.Path(f"{folder}/val/{i % 10}/{i}.jpg")
        name.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.effect_noise((500, 375), 20 + i % 80)
        Image.merge("RGB", [noise, noise.transpose(Image.FLIP_LEFT_RIGHT), noise.rotate(180)]).save(name, quality=90)


def run(command, cache):
    """(seconds, hits, seconds in the network where the command prints them) of a command."""
    started = time.perf_counter()
    env = {**os.environ, "XDG_CACHE_HOME": cache}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    seconds = time.perf_counter() - started
    found = re.search(r"(?:^|\()(\d+) of \d+", done.stdout, re.MULTILINE)
    if done.returncode or not found:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-500:]}")
    alone = re.search(r"([\d.]+) s in the network", done.stdout)
    return seconds, int(found[1]), float(alone[1]) if alone else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--image-size", type=int, default=299)
    parser.add_argument("--rounds", type=int, default=3)
    record.add_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(scratch, args.images, args.image_size)
        plain = [sys.executable, str(ROOT / "tests/bench/plain_evaluation.py")]
        zoo = [sys.executable, str(ROOT / "inception_v4/eval.py"), "--device=cpu", f"--data={scratch}", f"-b={BATCH}"]
        commands = {
            f"plain {name}": [*plain, name, f"{scratch}/net.onnx", f"{scratch}/val", str(BATCH), str(args.image_size)]
            for name in ("onnxruntime", "openvino")
        }
        for kind in ("onnx", "pth"):
            for options in ([], ["--engine=auto"], ["--fast"]):
                name = " ".join(["eval.py", f".{kind}", *options])
                commands[name] = [*zoo, f"--resume={scratch}/net.{kind}", *options]
        found = {name: [] for name in commands}
        for _ in range(args.rounds + 1):
            for name, command in commands.items():
                found[name].append(run(command, f"{scratch}/cache"))
                print(f"{name:32}{found[name][-1][0]:8.2f} s  {found[name][-1][1]} hits", flush=True)
    plain = [[found[f"plain {name}"][i] for name in ("onnxruntime", "openvino")] for i in range(1, args.rounds + 1)]
    best, alone = ([min(side[n] for side in sides) for sides in plain] for n in (0, 2))
    hits = found["plain onnxruntime"][0][1]
    for name in list(commands)[2:]:
        is_float32 = not name.endswith("--fast")
        if is_float32:
            assert {found_hits for _, found_hits, _ in found[name]} == {hits}, name
        ours = [seconds for seconds, _, _ in found[name][1:]]
        ratios = [b / seconds for b, seconds in zip(best, ours, strict=True)]
        reached = statistics.median(a / seconds for a, seconds in zip(alone, ours, strict=True))
        bound = record.limited("the network alone, float32", reached) if is_float32 else {}
        print(f"{name:32} ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {bound}")
        what = f"{name} of Inception v4, {args.images} images of 500 x 375, command to counts"
        against = "the faster of ONNX Runtime and OpenVINO (float32) in a plain loop"
        note = f"{found[name][-1][1]} hits, the plain loop {hits}; {BATCH} images a batch"
        record.record(args.record, "evaluation", what, against, **record.compared(ratios), **bound, note=note)


if __name__ == "__main__":
    main()
