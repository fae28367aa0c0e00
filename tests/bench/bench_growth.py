"""Time and memory of what grows with the number of images: the order of a step, and the start with a cached index.

    python tests/bench/bench_growth.py --images 1281167 14197122 100000000

No image exists: the cached index is written from generated names, below real class folders (1,000; 21,841 beyond two
million images), whose modification times a start compares. Every measurement runs in a new process, and the smallest
number of images is measured again in every round, in turns with the others. A step has 2,048 images; sorting all words
of an epoch, as most samplers do, is the baseline. Memory is what the measurement adds to a process at its peak; pages
of the cache file are shared by all processes of a machine. The limit of a start is hashing the bytes of the index.
"""

import argparse
import hashlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import bench_index
import record

from common.data import cache, index, sampling

STEP = 2048


def names(num_images, classes):
    """Packed names of equal length, in index order: uint8 [bytes]."""
    import numpy as np

    template = np.frombuffer(b"n10000000/n10000000_000000000.JPEG\0", np.uint8)
    packed = np.tile(template, (num_images, 1))
    of_class = np.arange(num_images, dtype=np.int64) * classes // num_images
    for number, last in ((of_class, 8), (of_class, 18), (np.arange(num_images), 28)):
        number = number.copy()
        for digit in range(last, last - (8 if last == 28 else 5), -1):
            packed[:, digit] = 48 + number % 10
            number //= 10
    return packed, of_class.astype(np.int32)


def make(root, num_images, folders):
    """Class folders below `root`, and a cached index of files in them that do not exist."""
    import numpy as np

    packed, labels = names(num_images, folders)
    classes = [f"n{10_000_000 + i}" for i in range(folders)]
    os.makedirs(root)
    for name in classes:
        os.mkdir(f"{root}/{name}")
    for folder in (*classes, "."):
        os.utime(f"{root}/{folder}", (1_600_000_000, 1_600_000_000))
    ends = np.arange(1, num_images + 1, dtype=np.int64) * packed.shape[1] - 1
    found = index.FolderIndex(root, tuple(classes), labels, 0, packed.reshape(-1), ends)
    times = {folder: 1_600_000_000 * 10**9 for folder in (".", *classes)}
    header = dict(classes=classes, ignored=0, kinds={}, rules=index._RULES, folders=times)
    header["fingerprint"] = found.fingerprint
    cache.write(root, header, dict(ends=ends, labels=labels, names=found._names))


def measure(what, num_images, root):
    """Print seconds and added memory of one measurement as JSON."""
    if what == "start":
        before, started = bench_index.memory(), time.perf_counter()
        loaded = index.load_folder(root)
        seconds, after = time.perf_counter() - started, bench_index.memory()
        assert len(loaded) == num_images
        print(json.dumps(dict(seconds=seconds, **{name: after[name] - before[name] for name in ("own", "mapped")})))
        return
    if what == "hash":
        _, arrays = cache.read(root)
        digest, started = hashlib.sha256(), time.perf_counter()
        for array in arrays.values():
            digest.update(array.data)
        print(json.dumps(dict(seconds=time.perf_counter() - started, own=0, mapped=0)))
        return
    import numpy as np

    sampling.images_at(0, 0, 10, np.arange(10))
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for epoch in range(1 if what == "sort" else 300):
        started = time.perf_counter()
        if what == "sort":
            words = np.random.Philox(np.random.SeedSequence((1, 0, epoch))).random_raw(num_images)
            np.argsort(words, kind="stable")[:STEP]
        else:
            sampling.images_at(
                0, epoch, num_images, np.arange(1000 * STEP % num_images, 1000 * STEP % num_images + STEP)
            )
        seconds.append(time.perf_counter() - started)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps(dict(seconds=statistics.median(seconds), own=peak, mapped=0)))


def run(what, num_images, root, cache_folder):
    command = [sys.executable, __file__, "--measure", what, "--images", str(num_images), "--root", root]
    env = {**os.environ, "XDG_CACHE_HOME": cache_folder, "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1_281_167, 14_197_122, 100_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="folder of the cached index, 47 bytes an image; default: a temporary one")
    parser.add_argument("--measure", choices=("step", "sort", "start", "hash", "make"), help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    record.add_option(parser)
    args = parser.parse_args()
    if args.measure == "make":
        make(args.root, args.images[0], 1_000 if args.images[0] < 2_000_000 else 21_841)
        print("{}")
        return
    if args.measure:
        measure(args.measure, args.images[0], args.root)
        return
    first, found = args.images[0], {}
    if args.folder:
        os.makedirs(args.folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for num_images in args.images:
            root, small = f"{scratch}/{num_images}", f"{scratch}/{first}"
            run("make", num_images, root, scratch)
            run("start", num_images, root, scratch)  # fills the page cache
            rounds = {what: [] for what in ("step", "sort", "start", "hash", "smallest")}
            for _ in range(args.rounds):
                rounds["smallest"].append(run("step", first, small, scratch))
                rounds["step"].append(run("step", num_images, root, scratch))
                for what in ("start", "hash"):
                    rounds[what].append(run(what, num_images, root, scratch))
            rounds["sort"].append(run("sort", num_images, root, scratch))
            found[num_images] = rounds
            print(f"{num_images:,} images", flush=True)
            for what, results in rounds.items():
                ms = [1000 * result["seconds"] for result in results]
                mib = {
                    name: statistics.median(result[name] for result in results) / 2**20 for name in ("own", "mapped")
                }
                print(
                    f"  {what:9}{statistics.median(ms):10.2f} ms ({min(ms):.2f} to {max(ms):.2f})"
                    f"{mib['own']:9.1f} MiB own{mib['mapped']:9.1f} MiB mapped",
                    flush=True,
                )
            if num_images == first:
                continue
            step, smallest = (
                round(1000 * statistics.median(result["seconds"] for result in rounds[what]), 2)
                for what in ("step", "smallest")
            )
            mib = max(result["own"] for result in rounds["step"]) / 2**20
            sort = rounds["sort"][0]
            record.record(
                args.record,
                f"order_{num_images}",
                f"order of a step of {STEP:,} of {num_images:,} images",
                f"the same for {first:,} images",
                zoo=step,
                baseline=smallest,
                unit="ms",
                pairs=args.rounds,
                note=f"{mib:.1f} MiB; sorting all images: {sort['seconds']:.2f} s, {sort['own'] / 2**20:,.0f} MiB",
            )
            start, hashing = ([result["seconds"] for result in rounds[what]] for what in ("start", "hash"))
            reached = statistics.median(a / b for a, b in zip(hashing, start, strict=True))
            record.record(
                args.record,
                f"start_{num_images}",
                f"start of a process with a cached index of {num_images:,} images",
                f"the same for {first:,} images",
                zoo=round(1000 * statistics.median(start)),
                baseline=round(1000 * statistics.median(r["seconds"] for r in found[first]["start"])),
                unit="ms",
                pairs=args.rounds,
                **record.limited("hashing the bytes of the index", reached),
                note="names are generated; folders are real",
            )


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    main()
