"""Time of a training step of Inception v3 compared with PyTorch's ImageNet example, in turns (A B A B).

    python tests/bench/bench_training.py --image-size 299 -b 16 --rounds 9
    python tests/bench/bench_training.py --compile
    python tests/bench/bench_training.py --amp --amp-dtype=bf16

Both read the same JPEGs with the same number of dataloader workers on the CPU. The first two rounds are not counted.
Options that this program does not know, as in the last two commands, are passed to the zoo's training.
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

WARM_UP_ROUNDS = 2
# The environment before the zoo sets OpenMP's variables: the baseline runs without them.
ENVIRONMENT = dict(os.environ)


class ZooTraining:
    """The zoo's training of Inception v3, one step per call."""

    def __init__(self, root, batch_size, image_size, workers, *options):
        from stepping import Stepping

        from inception_v3.train import PROGRAM

        argv = [f"--data={root}", f"--batch-size={batch_size}", f"--image-size={image_size}", f"--workers={workers}"]
        self._training = Stepping(PROGRAM, [*argv, *options], root)

    def step(self):
        self._training.step()
        self._training.trainer.check_finite()  # wait for the loss at every step, as the baseline does

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
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def serve(name, root, *arguments):
    """Body of a Process."""
    if name == "plain":
        from plain_training import PlainTraining as Training
    else:
        Training = ZooTraining
    program = Training(root, *map(int, arguments[:3]), *arguments[3:])
    for _ in sys.stdin:
        started = time.perf_counter()
        program.step()
        print(time.perf_counter() - started, flush=True)
    program.close()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--image-size", type=int, default=299)
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("-j", "--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    record.add_option(parser)
    args, zoo_options = parser.parse_known_args()
    from make_sample_data import SampleConfig, make

    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/data", SampleConfig(train_per_class=40, val_per_class=1))
        shape = (f"{folder}/data", args.batch_size, args.image_size, args.workers)
        programs = {"plain": Process("plain", *shape), "zoo": Process("zoo", *shape, *zoo_options)}
        seconds = {name: [] for name in programs}
        for _ in range(args.rounds):
            for name, program in programs.items():
                seconds[name].append(program.step())
        for program in programs.values():
            program.close()
    kept = {name: values[WARM_UP_ROUNDS:] for name, values in seconds.items()}
    for name, values in kept.items():
        median = statistics.median(values)
        print(
            f"{name:6} median step {median:.3f} s, {args.batch_size / median:.2f} images/s; "
            f"first step {seconds[name][0]:.1f} s"
        )
    ratios = [plain / zoo for plain, zoo in zip(kept["plain"], kept["zoo"], strict=True)]
    print(
        f"zoo is {statistics.median(ratios):.2f} times as fast (median of {len(ratios)} pairs, "
        f"{min(ratios):.2f} to {max(ratios):.2f})"
    )
    name, precision = "training_step", "float32"
    if "--amp" in zoo_options:
        name, precision = "training_step_bf16", "bf16"  # fp16 is refused on a CPU
    options = [word for word in zoo_options if not word.startswith("--amp")]
    what = f"training step of Inception v3, {args.image_size} pixels, batch {args.batch_size}, {precision}"
    if options:
        name = "_".join([name, *(word.lstrip("-").partition("=")[0] for word in options)])
        what += f", `{' '.join(options)}`"
    against = "PyTorch's ImageNet example (NCHW, float batches)" + (", float32" if precision != "float32" else "")
    record.record(args.record, name, what, against, **record.compared(ratios))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
