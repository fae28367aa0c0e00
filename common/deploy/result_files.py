"""What every inference run has, in ais_bench's names and layouts: options, inputs, results, summary."""

import dataclasses
import json
import os
import pathlib
import re
import time

import numpy as np

from common import cli
from common.errors import UserError
from common.files import write_atomic

OUTFMTS = ("BIN", "NPY", "TXT")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options of ais_bench that mean the same wherever a model runs."""

    model: str = cli.option("", "model file")
    input: str = cli.option(
        "",
        "folder of .bin or .npy files, or files separated by commas; none: pure inference, which "
        "measures the network alone",
    )
    output: str = cli.option("", "parent folder of the results; none: nothing is saved")
    output_dirname: str = cli.option("", "name of the results' folder inside --output (default: the time)")
    outfmt: str = cli.option("BIN", "format of the results", choices=OUTFMTS)
    batchsize: int | None = cli.option(None, "images per run; a model built for one number takes no other", low=1)
    loop: int = cli.option(1, "repetitions of every run", low=1)
    warmup_count: int = cli.option(1, "runs of the first batch that are not counted", low=0)
    pure_data_type: str = cli.option("zero", "input of pure inference", choices=("zero", "random"))

    def __post_init__(self):
        cli.check_ranges(self)
        if self.output_dirname and not self.output:
            raise UserError("--output-dirname: needs --output")


def natural_key(name):
    """Sort key that compares runs of digits as numbers and other text in lower case."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)]


def list_inputs(argument):
    """The input files of a run, in the order ais_bench takes them.

    Args:
      argument: value of --input: one folder, or files separated by commas.
    Returns:
      list of pathlib.Path; all .bin or all .npy.
    Raises:
      UserError: nothing there, or names that would give results of the same name.
    """
    parts = [pathlib.Path(part) for part in argument.split(",") if part]
    if len(parts) == 1 and parts[0].is_dir():
        names = sorted(entry.name for entry in os.scandir(parts[0]) if entry.name.lower().endswith((".bin", ".npy")))
        files = [parts[0] / name for name in sorted(names, key=natural_key)]
        if not files:
            raise UserError(f"--input: {parts[0]} has no .bin or .npy files; make them with preprocess.py")
    else:
        files = parts
        missing = [path for path in files if not path.is_file()]
        if missing or not files:
            raise UserError(
                f"--input: {', '.join(map(str, missing[:3])) or argument} does not exist; expected one "
                "folder, or files separated by commas"
            )
    if len({path.suffix.lower() for path in files}) > 1:
        raise UserError(f"--input: {argument} mixes .bin and .npy files")
    stems = {}
    for path in files:
        other = stems.setdefault(path.name.partition(".")[0], path)
        if other is not path:
            raise UserError(f"--input: {other.name} and {path.name} would both give {path.name.partition('.')[0]}_0")
    return files


def sample_bytes(path):
    """Bytes of the numbers in an input file, without the header of an .npy file."""
    if path.suffix.lower() == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False).nbytes
    return path.stat().st_size


def check_sizes(files, expected, what):
    """Every input file must hold exactly one sample; ais_bench itself only looks whether the sizes divide.

    Args:
      files: .bin or .npy paths.
      expected: bytes of one sample.
      what: the sample in words, for the message.
    Raises:
      UserError: the first file that does not.
    """
    for path in files:
        size = sample_bytes(path)
        if size != expected:
            raise UserError(f"--input: {path} holds {size} bytes, one image of the model is {expected} ({what})")


def load_sample(path, out):
    """Read one input file into an array of the right shape and type.

    Raises:
      UserError: an .npy of another type.
    """
    if path.suffix.lower() == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.dtype != out.dtype:
            raise UserError(f"--input: {path} holds {array.dtype}, the model takes {out.dtype}")
        out[...] = array.reshape(out.shape)
        return
    with path.open("rb", buffering=0) as file:
        view = memoryview(out.reshape(-1).view(np.uint8))
        while view:
            count = file.readinto(view)
            if not count:
                raise UserError(f"--input: {path} became shorter while it was read")
            view = view[count:]


def claim_output(output, dirname):
    """Create the folder of a run's results.

    ais_bench overwrites equal names and leaves the rest, so a folder with files in it would mix two runs.

    Returns:
      (folder, summary path): the summary lies beside the folder, or in it when `dirname` ends with a slash.
    Raises:
      UserError: the folder holds files, or cannot be made.
    """
    prefix = os.path.join(output, dirname or time.strftime("%Y_%m_%d-%H_%M_%S"))  # noqa: PTH118
    folder, summary = pathlib.Path(prefix), pathlib.Path(prefix + "_summary.json")
    if os.path.isabs(dirname):  # noqa: PTH117
        raise UserError(f"--output-dirname: {dirname} is absolute; it is a name inside --output")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output-dirname: {folder} already holds files; choose another name or remove it")
    if summary.exists():
        raise UserError(f"--output-dirname: {summary} is left from an earlier run; choose another name or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be made ({error.strerror})") from error
    return folder, summary


def write_result(folder, stem, outfmt, row):
    """Write the logits of one image as {stem}_0.{bin,npy,txt}.

    TXT has six decimals and a blank after every number, one line per row.
    """
    path = folder / f"{stem}_0.{outfmt.lower()}"
    if outfmt == "NPY":
        np.save(path, row[None])
    elif outfmt == "BIN":
        row.tofile(path)
    else:
        path.write_text("%f " * len(row) % tuple(row.tolist()) + "\n")
    return path


def statistics(milliseconds):
    """min, max, mean, median, 99th percentile and count, under the names of ais_bench's summary."""
    values = np.asarray(milliseconds)
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "percentile(99%)": float(np.percentile(values, 99)),
        "count": len(values),
    }


def throughput_line(batch_size, mean_ms):
    """The line users look for; images per second of the network alone, without reading and writing files."""
    return (
        f"[INFO] throughput 1000*batchsize.mean({batch_size})/NPU_compute_time.mean({mean_ms}): "
        f"{1000 * batch_size / mean_ms}"
    )


def write_summary(path, filesinfo, arguments, compute_ms, batch_size):
    """Write the summary JSON of a run that has come to its end."""
    compute = statistics(compute_ms)
    content = {
        "filesinfo": filesinfo,
        "args": arguments,
        "NPU_compute_time": compute,
        "H2D_latency": statistics([0.0]),
        "D2H_latency": statistics([0.0]),
        "throughput": 1000 * batch_size / compute["mean"],
        "npu_compute_time_list": list(compute_ms),
        "pid": os.getpid(),
    }
    write_atomic(path, json.dumps(content))
    return compute
