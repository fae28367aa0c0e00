"""Evaluation of Inception v4 on the CPU, command to counts, compared with plain loops over an .onnx file (A B A B).

    python tests/bench/bench_evaluation.py --data DIR --ckpt model_best.pth.tar

The images are those of DIR/val. The baseline is the faster of ONNX Runtime and OpenVINO in float32, each in a loop of
one process that decodes, preprocesses and runs batches of 16. The zoo's side is eval.py with the .onnx file and with
the checkpoint, by default, with --engine auto and with --fast, and with an int8 file that tools/quantize.py made of the
.onnx file. The first round fills the caches, the choice of engines and the converted checkpoint among them, and is not
counted. Hits must be those of the baseline, except with --fast and int8.

Each row also notes the limit: the time that the convolutions of all images alone take at the highest rate that one
convolution of the network reaches on this machine, on all cores.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import record

from common.data import index
from common.deploy import export
from inception_v4.spec import SPEC

ROOT, BATCH = record.ROOT, 16
GFLOP_OF_IMAGE = 24.5  # convolutions of Inception v4 at 299 pixels


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
    parser.add_argument("--data", required=True, help="dataset root with the classes of the checkpoint")
    parser.add_argument("--ckpt", required=True, help="of Inception v4")
    parser.add_argument("--image-size", type=int, default=299)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", metavar="PATTERN", default="", help="the commands that match, and the baselines")
    parser.add_argument("--note", default="", help="on the state of the machine, for the rows")
    record.add_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        # The weights alone: a checkpoint is evaluated in the precision of its training.
        convert = [sys.executable, str(ROOT / "tools/convert_weights.py"), args.ckpt, f"{scratch}/net.pth"]
        subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        export.export(SPEC, export.ExportConfig(ckpt=args.ckpt, onnx=f"{scratch}/net.onnx", image_size=args.image_size))
        plain = [sys.executable, str(ROOT / "tests/bench/plain_evaluation.py")]
        zoo = [sys.executable, str(ROOT / "inception_v4/eval.py"), "--device=cpu", f"--data={args.data}", f"-b={BATCH}"]
        commands = {
            f"plain {name}": [*plain, name, f"{scratch}/net.onnx", f"{args.data}/val", str(BATCH), str(args.image_size)]
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
            command = [*quantize, f"{scratch}/net.int8.onnx", f"--data={args.data}", *limits]
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
    num_images = len(index.load_folder(f"{args.data}/val"))
    limit = num_images * GFLOP_OF_IMAGE * (args.image_size / 299) ** 2 / rate
    print(f"convolutions alone: {limit:.2f} s at {rate:.0f} Gflop/s; the plain loop: {statistics.median(best):.2f} s")
    hits = found["plain onnxruntime"][0][1]
    for name in list(commands)[2:]:
        is_exact = "--fast" not in name and "int8" not in name
        assert not is_exact or {found_hits for _, found_hits in found[name]} == {hits}, name
        seconds = [seconds for seconds, _ in found[name][1:]]
        ratios = [b / own for b, own in zip(best, seconds, strict=True)]
        print(f"{name:32} ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        what = f"{name} of Inception v4, {num_images} photographs, command to counts"
        against = "the faster of ONNX Runtime and OpenVINO (float32) in a plain loop"
        note = f"{found[name][-1][1]} hits, the plain loop {hits}; {statistics.median(seconds):.1f} s"
        if is_exact:
            share = 100 * limit / statistics.median(seconds)
            note += f", of which float32 convolutions alone at {rate:.0f} Gflop/s: {limit:.1f} s, {share:.0f} %"
        note += f"; {args.note}" if args.note else ""
        record.record(args.record, "evaluation", what, against, **record.compared(ratios), note=note)


if __name__ == "__main__":
    main()
