"""What the stand-ins for the Python front ends of ais_bench share: batching, result files, summary, path checks.

FAKE_AIS_STOP=midway dies after the first run, =nosummary forgets the summary, =sumary spells it as old ones do. The
computing time of a run is that of the published table.
"""

import dataclasses
import json
import os
import pathlib
import re
import stat
import sys

import aclruntime
import numpy as np

FPS = {1: 761.4, 4: 1498.5, 8: 1315.3, 16: 1181.3, 32: 1163.6, 64: 1168.9}


@dataclasses.dataclass
class Style:
    """What one front end does differently.

    Attributes:
      checks_paths: refuses links, blanks, other people's files and loose permissions; else it takes anything.
      divides: splits the input over the devices without being asked.
      device_folder: of its results, from id and position of a device.
      lower: `[info]`, `Throughput`, and a drawn table.
      percentile: key in the summary.
    """

    checks_paths: bool
    divides: bool
    device_folder: str
    lower: bool
    percentile: str

    def say(self, text, level="INFO"):
        print(f"[{level.lower() if self.lower else level}] {text}", flush=True)


def illegal(path, refused_mode, must_exist=True):
    """The reason why a strict front end refuses a path, or None."""
    absolute = os.path.abspath(path)
    if re.search(r"[^_A-Za-z0-9/.-]", absolute):
        return "path contains illegal char, legal chars include A-Z a-z 0-9 _ - / ."
    if not os.path.lexists(absolute):
        return f"path: {absolute} not exist, please check if file or dir is exist" if must_exist else None
    found = os.lstat(absolute)
    if stat.S_ISLNK(found.st_mode):
        return f"path :{absolute} is a soft link, not supported, please import file(or directory) directly"
    if found.st_uid != os.geteuid() and found.st_gid not in os.getgroups():
        return f"current user isn't path:{absolute}'s owner or ownergroup"
    if found.st_mode & refused_mode:
        return f"The file {absolute} is group writable, or is others writable, permission should not be over"
    return None


READ, WRITE = 0o022, 0o027


def path_type(error, refused_mode, must_exist=True, split=False):
    """A function that returns a path that is legal and raises `error` for another."""

    def check(text):
        for part in text.split(",") if split else [text]:
            if reason := illegal(part, refused_mode, must_exist):
                print(f"[ERROR] {reason}", flush=True)
                raise error(f"path:{part} is illegal. Please check.")
        return text

    return check


def natural(name):
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]


def collect(folder, style):
    for entry in sorted(os.listdir(folder)) if style.checks_paths else []:
        if reason := illegal(os.path.join(folder, entry), READ):
            style.say(reason, "ERROR")
            raise RuntimeError(f"input data:{os.path.join(folder, entry)} is illegal")
    found = [path for path in pathlib.Path(folder).iterdir() if path.suffix in (".npy", ".NPY", ".bin", ".BIN")]
    if not found:
        style.say(f"{folder} of input args not find valid file,valid file format:[*.npy *.NPY *.bin *.BIN]", "ERROR")
        raise RuntimeError()
    return sorted(found, key=lambda path: natural(path.name))


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


def infer_files(session, files, folder, args, style):
    """Only divisibility of byte counts is asked for; the last run is padded with its own first file."""
    tensor, first = session.get_inputs()[0].realsize, payload(files[0]).size
    if tensor % first:
        style.say(f"arg0 tensorsize: {tensor} filesize: {first} not match", "ERROR")
        raise RuntimeError()
    per_run = tensor // first
    runs = [files[i : i + per_run] for i in range(0, len(files), per_run)]
    style.say(
        f"get filesperbatch files0 size:{first} tensor0size:{tensor} filesperbatch:{per_run} runcount:{len(runs)}"
    )
    filesinfo = {}
    for number, run in enumerate(runs):
        if os.environ.get("FAKE_AIS_STOP") == "midway" and number == 1:
            raise RuntimeError("[1][ACL: invalid parameter] ")
        padded = [*run, *run[:1] * (per_run - len(run))]
        logits = session.run(np.concatenate([payload(path) for path in padded]))
        for j, (path, rows) in enumerate(zip(run, np.array_split(logits, per_run), strict=False)):
            if folder:
                out = write(folder, path.name.split(".")[0], args.outfmt, rows)
                filesinfo[str(number * per_run + j)] = {"infiles": [str(path)], "outfiles": [out]}
    return filesinfo, len(runs)


def one_device(device, args, files, prefix, style):
    """Run one device; returns its throughput."""
    session = aclruntime.InferenceSession(args.model, device)
    if args.dymBatch:
        session.set_dynamic_batchsize(args.dymBatch)
    own = args.dymBatch or session.get_inputs()[0].shape[0]
    if not args.batchsize:
        style.say(f"try get model batchsize:{own}")
    if own < 0:
        raise RuntimeError("dynamic batch om model detected, but dymbatch, dymdims or dymshape not set!")
    batch = args.batchsize or own
    filesinfo, runs = {}, 1
    if prefix:
        os.makedirs(prefix, 0o750 if style.checks_paths else 0o755, exist_ok=True)
        style.say(f"output path:{prefix}")
    if files:
        filesinfo, runs = infer_files(session, files, pathlib.Path(prefix) if prefix else None, args, style)
    style.say(f"warm up {args.warmup_count} done")
    mean = 1000 * own / FPS.get(own, 1000.0)
    times = {**dict.fromkeys(("min", "max", "mean", "median", style.percentile), mean), "count": runs * args.loop}
    throughput = 1000 * batch / mean
    style.say("-----------------Performance Summary------------------")
    if style.lower:
        print(
            f"╒═══════╤════════╕\n│ Metric│   mean │\n╞═══════╪════════╡\n│ NPU_compute_time (ms) │ {mean:.4f} │\n╘═══════╧════════╛"
        )
    else:
        style.say(
            f"NPU_compute_time (ms): min = {mean}, max = {mean}, mean = {mean}, median = {mean}, percentile(99%) = {mean}"
        )
    style.say(
        f"{'T' if style.lower else 't'}hroughput 1000*batchsize.mean({batch})/NPU_compute_time.mean({mean}): {throughput}"
    )
    style.say("------------------------------------------------------")
    stop = os.environ.get("FAKE_AIS_STOP")
    if prefix and stop != "nosummary":
        latencies = {key: times for key in ("NPU_compute_time", "H2D_latency", "D2H_latency")}
        content = {"filesinfo": filesinfo, "args": sys.argv, **latencies, "throughput": throughput}
        content |= {"npu_compute_time_list": [mean] * runs * args.loop, "pid": os.getpid()}
        name = f"{prefix}_{'sumary' if stop == 'sumary' else 'summary'}.json"
        pathlib.Path(name).write_text(json.dumps(content))
    return throughput


def shares(files, count):
    """Consecutive, the first ones one longer."""
    bounds = [len(files) * 0 + i * (len(files) // count) + min(i, len(files) % count) for i in range(count + 1)]
    return [files[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]


def main(args, style):
    """The program; `args` has the names of the options of 2023, and divide_input."""
    if args.output_dirname and style.checks_paths and os.path.isabs(args.output_dirname):
        raise ValueError("--output_dirname do not support abs path!")
    if args.output_dirname and not args.output:
        raise RuntimeError("error bad parameters --output_dirname")
    prefix = os.path.join(args.output, args.output_dirname or "2026_01_01-00_00_00") if args.output else ""
    if prefix and style.checks_paths and (reason := illegal(prefix, READ, must_exist=False)):
        style.say(reason, "ERROR")
        raise ValueError(f"The path:{prefix} is illegal. Please check the error log for more detail.")
    devices = [int(device) for device in args.device.split(",")]
    files = []
    if args.input:
        parts = [pathlib.Path(part) for part in args.input.split(",")]
        files = collect(args.input, style) if parts[0].is_dir() else parts
    if len(devices) == 1:
        one_device(devices[0], args, files, prefix, style)
        return
    divided = shares(files, len(devices)) if style.divides or args.divide_input else [files] * len(devices)
    total = 0.0
    for i, device in enumerate(devices):
        where = os.path.join(prefix, style.device_folder.format(device=device, index=i)) if prefix else ""
        total += one_device(device, args, divided[i], where, style)
    style.say(f"summary throughput:{total}")
