"""Time of a training step compared with PyTorch's ImageNet example or with timm, in turns (A B A B).

    python tests/bench/bench_training.py --image-size 299 -b 16 --rounds 9
    python tests/bench/bench_training.py --against timm --model inception_v4
    python tests/bench/bench_training.py --compile
    python tests/bench/bench_training.py --amp --amp-dtype=bf16

PyTorch's example (Inception v3) and the zoo read the same JPEGs with the same number of dataloader workers on the CPU.
timm's network is trained in channels_last with SGD and cross entropy; there, both sides repeat one batch in memory. The
limit is the time of the network's convolutions alone, in the same turns. The first two rounds are not counted. Options
that this program does not know, as in the last two commands, are passed to the zoo's training.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import record

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench"), str(ROOT / "tools")]

from common.environment import set_torch_defaults
from tools import models

TIMM_NAMES = {"inception_v3": "inception_v3", "inception_v4": "inception_v4", "xception": "legacy_xception"}
WARM_UP_ROUNDS = 2
# The environment before the zoo sets OpenMP's variables: the baseline runs without them.
ENVIRONMENT = dict(os.environ)


class ZooTraining:
    """The zoo's training, one step per call.

    Args:
      root: data set of JPEGs.
      workers: dataloader workers; `memory` repeats the first batch.
      options: of train.py.
    """

    def __init__(self, model, root, batch_size, image_size, workers, *options):
        from stepping import Stepping

        is_in_memory = workers == "memory"
        data = f"{root}/train" if model == "xception" else root
        argv = [f"--data={data}", f"--batch-size={batch_size}", f"--image-size={image_size}"]
        argv += ["--workers=0", "--num-classes=1000"] if is_in_memory else [f"--workers={workers}"]
        self._training = Stepping(models.program(model), [*argv, *options], root)
        self._batches = self._training.fetch() if is_in_memory else None

    def step(self):
        self._training.step(self._batches)
        self._training.trainer.check_finite()  # wait for the loss at every step, as the baselines do

    def close(self):
        self._training.close()


class Process:
    """A training run in its own process, which does one step per request."""

    def __init__(self, name, *arguments):
        command = [sys.executable, __file__, "--serve", name, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )

    def step(self):
        """Seconds of one step."""
        return self._ask("step")

    def flops(self):
        """Of one step; of Convolutions only."""
        return self._ask("flops")

    def _ask(self, what):
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def serve(name, model, root, *arguments):
    """Body of a Process."""
    program = make(name, model, root, *map(int, arguments[:2]), *arguments[2:])
    for line in sys.stdin:
        if line == "flops\n":
            print(program.flops, flush=True)
            continue
        started = time.perf_counter()
        program.step()
        print(time.perf_counter() - started, flush=True)
    program.close()


def make(name, model, root, batch_size, image_size, workers, *options):
    if name == "zoo":
        return ZooTraining(model, root, batch_size, image_size, workers, *options)
    if name == "timm":
        from timm_training import TimmTraining

        return TimmTraining(TIMM_NAMES[model], batch_size, image_size)
    if name == "convolutions":
        set_torch_defaults()  # the zoo's environment
        from convolutions import Convolutions

        from common.device.device import Device

        Device("cpu").activate()
        return Convolutions(models.spec(model).build(num_classes=1000), batch_size, image_size)
    from plain_training import PlainTraining

    return PlainTraining(root, batch_size, image_size, int(workers))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="inception_v3", choices=models.names())
    parser.add_argument("--against", default="example", choices=("example", "timm"))
    parser.add_argument("--image-size", type=int, default=299)
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("-j", "--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    record.add_option(parser)
    args, zoo_options = parser.parse_known_args()
    if args.against == "example" and args.model != "inception_v3":
        parser.error("PyTorch's example trains inception_v3 here; give --against timm")
    from make_sample_data import SampleConfig, make

    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/data", SampleConfig(train_per_class=40, val_per_class=1))
        workers = "memory" if args.against == "timm" else args.workers
        shape = (args.model, f"{folder}/data", args.batch_size, args.image_size, workers)
        programs = {
            args.against: Process(args.against, *shape),
            "zoo": Process("zoo", *shape, *zoo_options),
            "convolutions": Process("convolutions", *shape),
        }
        seconds = {name: [] for name in programs}
        for _ in range(args.rounds):
            for name, program in programs.items():
                seconds[name].append(program.step())
        flops = programs["convolutions"].flops()
        for program in programs.values():
            program.close()
    kept = {name: values[WARM_UP_ROUNDS:] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in kept.items()}
    for name, median in medians.items():
        print(
            f"{name:12} median step {median:.3f} s ({min(kept[name]):.3f} to {max(kept[name]):.3f}), "
            f"{args.batch_size / median:.2f} images/s; first step {seconds[name][0]:.1f} s"
        )
    ratios = [theirs / zoo for theirs, zoo in zip(kept[args.against], kept["zoo"], strict=True)]
    print(
        f"zoo is {statistics.median(ratios):.2f} times as fast (median of {len(ratios)} pairs, "
        f"{min(ratios):.2f} to {max(ratios):.2f})"
    )
    name, precision = "training_step", "float32"
    if "--amp" in zoo_options:
        name, precision = "training_step_bf16", "bf16"  # fp16 is refused on a CPU
    options = [word for word in zoo_options if not word.startswith("--amp")]
    title = args.model.replace("_", " ").capitalize()
    what = f"training step of {title}, {args.image_size} pixels, batch {args.batch_size}, {precision}"
    what += f", `{' '.join(options)}`" if options else ""
    against = "PyTorch's ImageNet example (NCHW, float batches)"
    if args.against == "timm":
        name += f"_timm_{args.model}"
        against = f"timm's {TIMM_NAMES[args.model]} in channels_last, both on a batch in memory"
    name = "_".join([name, *(word.lstrip("-").partition("=")[0] for word in options)])
    against += ", float32" if precision != "float32" else ""
    bound = {}
    if precision == "float32":
        rate = f"{flops / medians['convolutions'] / 1e9:.0f} Gflop/s"
        bound = record.limited(f"its convolutions alone, {rate}", medians["convolutions"] / medians["zoo"])
        print(f"limit: {bound['limit']}; share reached: {bound['fraction']:.2f}")
    record.record(args.record, name, what, against, **record.compared(ratios), **bound)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
