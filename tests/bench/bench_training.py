"""A training step of Inception v3, the zoo's against the plain way, in turns: A B A B.

    python tests/bench/bench_training.py --image-size 299 -b 16 --rounds 9

Both read the same JPEGs with the same number of loader processes on the same device. The first two rounds are left out.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench"), str(ROOT / "tools")]

from make_sample_data import SampleConfig, make
from plain_training import PlainTraining

from common import device as devices
from common import distributed
from common.train.report import Report
from common.train.trainer import Trainer
from inception_v3.train import PROGRAM

WARM_UP_ROUNDS = 2


class ZooTraining:
    """The real trainer, one step at a time."""

    def __init__(self, root, batch_size, image_size, workers, *options):
        argv = [
            f"--data={root}",
            f"--batch-size={batch_size}",
            f"--image-size={image_size}",
            f"--workers={workers}",
            "--device=cpu",
            *options,
        ]
        job = dataclasses.replace(PROGRAM.prepare(argv), folder=pathlib.Path(root))
        device, world = devices.Device("cpu"), distributed.World()
        self.trainer = Trainer(job, world, device, distributed.Group(world, device), Report(None))
        self.trainer.network.train()
        self.batches = self.trainer.train_loader.epoch(0)

    def step(self):
        trainer = self.trainer
        if trainer.step == trainer.plan.steps_per_epoch:
            trainer.epoch, trainer.step = trainer.epoch + 1, 0
            self.batches = trainer.train_loader.epoch(trainer.epoch)
        mine, error = trainer._fetch(self.batches)
        assert error is None
        trainer._train_step(mine)
        trainer.step += 1
        trainer._non_finite()  # as often as the plain program looks at its losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=299)
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("-j", "--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="torch.compile the zoo's network")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/data", SampleConfig(train_per_class=40, val_per_class=1))
        shape = (f"{folder}/data", args.batch_size, args.image_size, args.workers)
        programs = {"plain": PlainTraining(*shape), "zoo": ZooTraining(*shape, *["--compile"] * args.compile)}
        seconds = {name: [] for name in programs}
        for _ in range(args.rounds):
            for name, program in programs.items():
                started = time.perf_counter()
                program.step()
                seconds[name].append(time.perf_counter() - started)
        programs["zoo"].trainer.close()
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


if __name__ == "__main__":
    main()
