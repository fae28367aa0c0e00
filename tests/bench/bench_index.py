"""Start-up time and memory of the file index compared with torchvision's ImageFolder, in turns (A B A B).

    python tests/bench/bench_index.py --rounds 3

Makes 1,281,167 empty files in 1,000 folders below --folder, as many as ImageNet's training set has, or takes the files
that are there. Each measurement runs in a new process: ImageFolder, which has no cache; the first start, which lists
all folders; a second start, which maps the cached index. Memory is what the list of files adds to a process: its own
pages, pages mapped from the cache, which all processes of a machine share, and the peak.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import record

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FILES, FOLDERS = 1_281_167, 1_000


def make(folder, num_files, num_folders):
    """Empty files with ImageNet's kind of names, in class folders of equal size."""
    for i in range(num_folders):
        name = f"n{10_000_000 + 7 * i}"
        os.mkdir(f"{folder}/{name}")
        for k in range(num_files // num_folders + (i < num_files % num_folders)):
            os.close(os.open(f"{folder}/{name}/{name}_{17 * k}.JPEG", os.O_CREAT | os.O_WRONLY))
        os.utime(f"{folder}/{name}", (1_600_000_000, 1_600_000_000))  # the cache does not trust a recent mtime
    os.utime(folder, (1_600_000_000, 1_600_000_000))


def memory():
    """{own, mapped, peak} bytes of this process."""
    found = {}
    for name in ("smaps_rollup", "status"):
        for line in pathlib.Path(f"/proc/self/{name}").read_text().splitlines():
            if line.endswith("kB"):
                found[line.partition(":")[0]] = int(line.split()[1]) * 1024
    return dict(own=found["Anonymous"], mapped=found["Rss"] - found["Anonymous"], peak=found["VmHWM"])


def measure(what, folder):
    """One start in this process; prints seconds and added memory as JSON."""
    if what == "ImageFolder":
        from torchvision.datasets import ImageFolder as load
    else:
        from common.data.index import load_folder as load
    before, started = memory(), time.perf_counter()
    loaded = load(folder)
    seconds, after = time.perf_counter() - started, memory()
    files = len(loaded)
    added = {name: (after[name] - before[name]) / 2**20 for name in after}
    print(json.dumps(dict(seconds=seconds, files=files, **added)))


def start(what, folder, cache):
    command = [sys.executable, __file__, "--measure", what, "--folder", folder]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "XDG_CACHE_HOME": cache}
    )
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="folder of the files; default: a temporary one")
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--classes", type=int, default=FOLDERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    record.add_option(parser)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or f"{scratch}/train"
        if not os.path.isdir(folder):
            os.makedirs(folder)
            make(folder, args.files, args.classes)
        found = {"ImageFolder": [], "first start": [], "second start": []}
        for round_ in range(args.rounds + 1):  # the first one fills the file system's caches and is not counted
            cache = f"{scratch}/cache{round_}"
            for what, results in found.items():
                results.append(start(what, folder, cache))
    print(f"{'':14}{'seconds':>9}{'own MiB':>9}{'mapped MiB':>12}{'peak MiB':>10}  against ImageFolder")
    medians, ratios_of = {}, {}
    for what, results in found.items():
        kept, peer = results[1:], found["ImageFolder"][1:]
        middle = {name: statistics.median(result[name] for result in kept) for name in kept[0]}
        ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in zip(peer, kept, strict=True)]
        print(
            f"{what:14}{middle['seconds']:9.2f}{middle['own']:9.1f}{middle['mapped']:12.1f}{middle['peak']:10.1f}"
            f"  {statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})"
        )
        assert {result["files"] for result in kept} == {kept[0]["files"]}
        medians[what], ratios_of[what] = middle, ratios
    what, against = f"index of {args.files:,} empty files in {args.classes:,} folders", "torchvision's ImageFolder"
    for start_, name in (("first start", "index_first_start"), ("second start", "index_later_start")):
        words = "first start" if start_ == "first start" else "later starts"
        record.record(args.record, name, f"{what}, {words}", against, **record.compared(ratios_of[start_]))
    record.record(
        args.record,
        "index_memory",
        f"{what}, memory of a process",
        against,
        zoo=round(medians["second start"]["own"], 1),
        baseline=round(medians["ImageFolder"]["own"]),
        unit="MiB",
        pairs=args.rounds,
        note=f"plus {medians['second start']['mapped']:.0f} MiB that all processes of a machine share",
    )


if __name__ == "__main__":
    main()
