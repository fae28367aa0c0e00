"""From command to first training step with ImageNet's number of files, compared with timm's train.py (A B A B).

    python tests/bench/bench_startup.py --timm-train pytorch-image-models/train.py

Makes 1,281,167 training and 1,000 validation names (hard links to 1,000 drawn images) in 1,000 folders below --folder,
or takes those that are there. Both programs train Inception v3 on the CPU at 107 pixels with batch 8 and two dataloader
workers, so that the step itself is short. The clock runs from the start of the command until the line of the first step
is printed. The first round fills the caches, among them the zoo's index, and is not counted. With --ranks 2 the zoo's
launcher is compared with torchrun.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import bench_index
import record
from PIL import Image

STEP_OF = {"zoo": " step 1/", "timm": "Train: 0 [   0/"}


def make(root, num_files, num_folders):
    """train/ and val/ with class folders; the names of a folder are links to one image of its val/."""
    for i in range(num_folders):
        name = f"n{10_000_000 + 7 * i}"
        os.makedirs(f"{root}/val/{name}")
        os.makedirs(f"{root}/train/{name}")
        image = f"{root}/val/{name}/0.JPEG"
        Image.effect_noise((500, 375), 40 + i % 60).convert("RGB").save(image, quality=90)
        for k in range(num_files // num_folders + (i < num_files % num_folders)):
            os.link(image, f"{root}/train/{name}/{name}_{17 * k}.JPEG")
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1_600_000_000, 1_600_000_000))  # the cache does not trust a recent mtime


def command(who, args, root, output):
    same = ["--workers=2", "--lr=0.01"]
    if who == "zoo":
        options = [f"--data={root}", "--image-size=107", "--print-freq=1", *same]
        if args.ranks > 1:
            launcher = ["bash", f"{record.ROOT}/inception_v3/test/train_full_8p.sh", f"--devices={args.ranks}"]
            keys = [f"--data_path={root}", "--device=cpu", f"--batch_size={8 * args.ranks}", f"--output_dir={output}"]
            return [*launcher, *keys, "--", "--no-amp", "--loss-scale=1", *options[1:]]
        words = ["--device=cpu", "--batch-size=8", f"--output-dir={output}"]
        return [sys.executable, f"{record.ROOT}/inception_v3/train.py", *words, *options]
    launcher = [sys.executable]
    if args.ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={args.ranks}"]
    options = ["--model=inception_v3", "--device=cpu", "-b=8", "--log-interval=1", f"--output={output}"]
    return [
        *launcher,
        args.timm_train,
        f"--data-dir={root}",
        *options,
        *same,
        "--opt=sgd",
        "--input-size",
        "3",
        "107",
        "107",
    ]


def seconds_to_first_step(who, args, root, scratch):
    """Start a program, wait for the line of its first step, end it."""
    output = tempfile.mkdtemp(dir=scratch)
    env = {**os.environ, "XDG_CACHE_HOME": f"{scratch}/cache", "PYTHONUNBUFFERED": "1"}
    env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // args.ranks))
    started = time.perf_counter()
    words = command(who, args, root, output)
    program = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )
    lines = []
    try:
        for line in program.stdout:
            lines.append(line)
            if STEP_OF[who] in line:
                return time.perf_counter() - started
        raise SystemExit(f"{' '.join(words)}: ended before its first step:\n{''.join(lines[-20:])}")
    finally:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm-train", required=True, metavar="FILE", help="train.py of timm's repository")
    parser.add_argument("--folder", help="folder of train/ and val/; default: a temporary one")
    parser.add_argument("--files", type=int, default=bench_index.FILES)
    parser.add_argument("--classes", type=int, default=bench_index.FOLDERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    record.add_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = args.folder or f"{scratch}/images"
        if not os.path.isdir(root):
            make(root, args.files, args.classes)
        found = {"zoo": [], "timm": []}
        for _ in range(args.rounds + 1):
            for who, seconds in found.items():
                seconds.append(seconds_to_first_step(who, args, root, scratch))
                print(f"{who:5}{seconds[-1]:7.2f} s", flush=True)
    ours, theirs = (found[who][1:] for who in ("zoo", "timm"))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    for who, seconds in (("zoo", ours), ("timm", theirs)):
        print(f"{who:5}{statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    what = f"command to first step, {args.files:,} files, cached index, {args.ranks} rank(s)"
    note = f"{statistics.median(ours):.1f} s against {statistics.median(theirs):.1f} s"
    record.record(args.record, "startup", what, "timm's train.py", **record.compared(ratios), note=note)


if __name__ == "__main__":
    main()
