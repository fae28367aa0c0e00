"""Time that a checkpoint adds to a training step: written in the background, and written before the next step.

    python tests/bench/bench_checkpoint.py --model xception --image-size 75 -b 8

One step in a few saves, in turns with and without waiting for the writer thread (A B A B). The numbers are the time
that this step, and the ones after it, take beyond the median of the steps before it. The limit of the step that saves
is a copy of as many bytes in memory. The share of a run is that of the default interval: at the end of each epoch and
after its validation, with as many steps as ImageNet has batches of 256.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

import record

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


from tools import models

STEPS_BETWEEN = 4
STEPS_PER_EPOCH, SAVES_PER_EPOCH = 1_281_167 // 256, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="xception", choices=models.names())
    parser.add_argument("--image-size", type=int, default=75)
    parser.add_argument("-b", "--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    record.add_option(parser)
    parser.add_argument("--folder", default=None, help="folder to write to; default: a temporary one")
    args = parser.parse_args()
    from make_sample_data import SampleConfig, make

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make(f"{folder}/data", SampleConfig(train_per_class=40, val_per_class=1))
        training = Training(args, folder)
        for _ in range(3):
            training.step()
        added = {"beside": [], "before": []}
        for _ in range(args.rounds):
            for way, seconds in added.items():
                seconds.append(training.added_by_a_save(wait=way == "before"))
        size = (pathlib.Path(folder) / "run" / "checkpoint.pth.tar").stat().st_size
        copies = [seconds_to_copy(size) for _ in range(args.rounds)]
        training.close()
    print(
        f"{args.model}, {args.image_size} pixels, batch {args.batch_size}, checkpoint of {size / 1e6:.0f} MB, step "
        f"{1000 * statistics.median(training.plain):.0f} ms"
    )
    for way, pairs in added.items():
        stall, later = ([pair[n] for pair in pairs] for n in (0, 1))
        print(
            f"written {way} the next step: adds {1000 * statistics.median(stall):.0f} ms to the step that saves "
            f"({1000 * min(stall):.0f} to {1000 * max(stall):.0f}), {1000 * statistics.median(later):.0f} ms to it "
            f"and the {STEPS_BETWEEN} after it together"
        )
    of = f"{args.model}, {args.image_size} pixels, checkpoint of {size / 1e6:.0f} MB"
    steps = ("a training step", f"a training step and the {STEPS_BETWEEN} after it")
    for n, name in enumerate(("checkpoint_step", f"checkpoint_{STEPS_BETWEEN + 1}_steps")):
        beside, before = (round(1000 * statistics.median(pair[n] for pair in added[way])) for way in added)
        bound = record.limited("copying as many bytes", 1000 * statistics.median(copies) / beside) if n == 0 else {}
        record.record(
            args.record,
            name,
            f"time that saving adds to {steps[n]}, {of}",
            "written before the next step",
            zoo=beside,
            baseline=before,
            unit="ms",
            pairs=args.rounds,
            **bound,
        )
    step, later = statistics.median(training.plain), statistics.median(pair[1] for pair in added["beside"])
    share = 100 * SAVES_PER_EPOCH * later / (STEPS_PER_EPOCH * step)
    note = (
        f"{SAVES_PER_EPOCH} checkpoints in {STEPS_PER_EPOCH:,} steps of {1000 * step:.0f} ms; "
        f"1 % at {SAVES_PER_EPOCH * later / (0.01 * step):.0f} steps an epoch"
    )
    print(f"checkpoints at the default interval: {share:.3f} % of the training time; {note}")
    record.record(
        args.record,
        "checkpoint_share",
        f"share of checkpoints in the training time, default interval, {of}",
        "training without checkpoints",
        zoo=float(f"{share:.2g}"),
        unit="%",
        pairs=args.rounds,
        note=note,
    )


def seconds_to_copy(size):
    import torch

    source = torch.ones(size // 4)
    started = time.perf_counter()
    source.clone()
    return time.perf_counter() - started


class Training:
    """The zoo's trainer, one step per call, with the time of each."""

    def __init__(self, args, folder):
        from stepping import Stepping

        data = f"{folder}/data/train" if args.model == "xception" else f"{folder}/data"
        pathlib.Path(folder, "run").mkdir()
        self._training = Stepping(
            models.program(args.model),
            [
                "--data",
                data,
                "--num-classes=1000",
                f"--image-size={args.image_size}",
                f"--batch-size={args.batch_size}",
                "--workers=0",
                "--epochs=100",
                "--ema=0.99",
                f"--output-dir={folder}/run",
            ],
            f"{folder}/run",
        )
        self.trainer, self.plain = self._training.trainer, []

    def step(self, save=False, wait=False):
        """Seconds of one step, including a save."""
        started = time.perf_counter()
        self._training.step()
        if save:
            self.trainer._save()
        if wait:
            assert self.trainer.writer.wait() is None
        return time.perf_counter() - started

    def added_by_a_save(self, wait):
        """(seconds added to the step that saves, seconds added to it and the following ones together)."""
        self.trainer.writer.wait()
        before = [self.step() for _ in range(STEPS_BETWEEN)]
        usual = statistics.median(before)
        self.plain += before
        times = [self.step(save=True, wait=wait)] + [self.step() for _ in range(STEPS_BETWEEN)]
        return times[0] - usual, sum(times) - usual * len(times)

    def close(self):
        self._training.close()


if __name__ == "__main__":
    main()
