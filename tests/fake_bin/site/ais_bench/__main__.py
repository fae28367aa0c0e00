"""Stands in for `python -m ais_bench`: options, batching, files and lines of the real one, and what it lets through.

FAKE_AIS=2023 (default) or 2026 chooses the generation; FAKE_AIS_STOP=midway dies after the first run, =nosummary forgets
the summary, =sumary spells it as old ones do. The computing time per run is that of the published table.
"""

import argparse
import json
import os
import pathlib
import re
import sys

import numpy as np

from ais_bench.infer.interface import InferSession

NEW = os.environ.get("FAKE_AIS", "2023") == "2026"
STOP = os.environ.get("FAKE_AIS_STOP", "")
FPS = {1: 761.4, 4: 1498.5, 8: 1315.3, 16: 1181.3, 32: 1163.6, 64: 1168.9}


def say(text, level="INFO"):
    print(f"[{level.lower() if NEW else level}] {text}", flush=True)


def options():
    parser = argparse.ArgumentParser()
    for name in ("--model", "--input", "--output", "--output_dirname", "--device", "--dymHW"):
        parser.add_argument(name)
    parser.add_argument("--outfmt", default="BIN", choices=["NPY", "BIN", "TXT"])
    parser.add_argument("--pure_data_type", default="zero", choices=["zero", "random"])
    for name, default in (("--loop", 1), ("--batchsize", None), ("--dymBatch", 0), ("--warmup_count", 1)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    if args.output_dirname and not args.output:
        raise RuntimeError("error bad parameters --output_dirname")
    if args.loop < 1:
        parser.error("--loop must be positive")
    return args


def check_path(path):
    """The security checks of the versions since 2024."""
    path = pathlib.Path(path)
    if not re.fullmatch(r"[A-Za-z0-9_/.-]+", str(path.absolute())):
        raise ValueError(f"{path} contains invalid characters")
    if path.is_symlink():
        raise ValueError(f"{path} is a soft link")
    if path.exists() and path.stat().st_mode & 0o022:
        raise ValueError(f"{path} is writable by group or others")


def natural(name):
    return [int(p) if p.isdigit() else p.lower() for p in re.split(r"(\d+)", name)]


def collect(folder):
    files = sorted(
        (p for p in pathlib.Path(folder).iterdir() if p.suffix in (".npy", ".NPY", ".bin", ".BIN")),
        key=lambda p: natural(p.name),
    )
    if not files:
        say(f"{folder} of input args not find valid file,valid file format:[*.npy *.NPY *.bin *.BIN]", "ERROR")
        raise RuntimeError()
    if NEW:
        for file in files:
            check_path(file)
    return files


def payload(path):
    if path.suffix == ".npy":
        return np.ascontiguousarray(np.load(path)).view(np.uint8).reshape(-1)
    return np.fromfile(path, np.uint8)


def write(folder, stem, outfmt, rows):
    path = folder / f"{stem}_0.{outfmt.lower()}"
    if outfmt == "NPY":
        np.save(path, rows)
    elif outfmt == "BIN":
        rows.tofile(path)
    else:
        path.write_text("".join("".join(f"{value:f} " for value in row) + "\n" for row in rows))
    return str(path)


def infer_files(session, files, batch, folder, args):
    """Only divisibility of byte counts is asked for; the last run is padded with its own first file."""
    tensor, first = batch * session.sample_bytes, payload(files[0]).size
    if tensor % first:
        say(f"arg0 tensorsize: {tensor} filesize: {first} not match", "ERROR")
        raise RuntimeError()
    per_run = tensor // first
    runs = [files[i : i + per_run] for i in range(0, len(files), per_run)]
    say(f"get filesperbatch files0 size:{first} tensor0size:{tensor} filesperbatch:{per_run} runcount:{len(runs)}")
    filesinfo = {}
    for number, run in enumerate(runs):
        if STOP == "midway" and number == 1:
            raise RuntimeError("[1][ACL:invalid parameter]")
        logits = session.logits(np.concatenate([payload(path) for path in run]))
        rows = np.array_split(logits, len(run)) if len(logits) != len(run) else logits[:, None]
        for j, path in enumerate(run):
            out = write(folder, path.name.split(".")[0], args.outfmt, rows[j]) if folder else ""
            if folder:
                filesinfo[str(number * per_run + j)] = {"infiles": [str(path)], "outfiles": [out]}
    return filesinfo, len(runs)


def one_device(args, folder, summary):
    session = InferSession(0, args.model)
    own = args.dymBatch or session.shape[0]
    if session.model["gears"] and not args.dymBatch:
        raise RuntimeError("the dynamic_batch_size parameter is not specified")
    say(f"try get model batchsize:{own}")
    batch = args.batchsize or own
    filesinfo, runs = {}, 1
    if args.input:
        filesinfo, runs = infer_files(session, collect(args.input), own, folder, args)
    mean = 1000 * own / FPS.get(own, 1000.0)
    times = {
        "min": mean,
        "max": mean,
        "mean": mean,
        "median": mean,
        "P99" if NEW else "percentile(99%)": mean,
        "count": runs * args.loop,
    }
    throughput = 1000 * batch / mean
    say("-----------------Performance Summary------------------")
    say(f"NPU_compute_time (ms): min = {mean}, max = {mean}, mean = {mean}, median = {mean}, percentile(99%) = {mean}")
    say(f"{'T' if NEW else 't'}hroughput 1000*batchsize.mean({batch})/NPU_compute_time.mean({mean}): {throughput}")
    if folder and STOP != "nosummary":
        if STOP == "sumary":
            summary = summary.replace("summary", "sumary")
        pathlib.Path(summary).write_text(
            json.dumps(
                {
                    "filesinfo": filesinfo,
                    "args": sys.argv,
                    "NPU_compute_time": times,
                    "H2D_latency": times,
                    "D2H_latency": times,
                    "throughput": throughput,
                    "npu_compute_time_list": [mean],
                    "pid": os.getpid(),
                }
            )
        )
    return throughput


def main():
    args = options()
    if NEW:
        for path in (args.model, args.input):
            if path:
                check_path(path)
        if args.output_dirname and os.path.isabs(args.output_dirname):
            raise ValueError("output_dirname do not support abs path!")
    prefix = os.path.join(args.output, args.output_dirname) if args.output else ""
    devices = (args.device or "0").split(",")
    total = 0.0
    for device in devices:
        where = os.path.join(prefix, f"device{device}") if len(devices) > 1 and prefix else prefix
        if where:
            os.makedirs(where, exist_ok=True)
        total += one_device(args, pathlib.Path(where) if where else None, where + "_summary.json")
    if len(devices) > 1:
        say(f"summary throughput:{total}")


if __name__ == "__main__":
    main()
