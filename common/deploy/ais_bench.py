"""Runs `python -m ais_bench`, checks what it lets through in silence, and reads what it leaves behind."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

from common import cli
from common.deploy import atc, result_files
from common.errors import RunError, UserError
from common.evaluation import engines

SAFE_PATH = re.compile(r"[A-Za-z0-9_/.-]+")
MAX_FILES = 100_000
MAX_BYTES = 4 * 2**30
THROUGHPUT = re.compile(
    r"throughput\s+1000\*batchsize\.mean\([^)]*\)/NPU_compute_time\.mean\([^)]*\):\s*([0-9.eE+-]+)", re.IGNORECASE
)
SUMMED = re.compile(r"summary throughput:\s*([0-9.eE+-]+)", re.IGNORECASE)
PER_BATCH = re.compile(r"filesperbatch:\s*(\d+)\s+runcount", re.IGNORECASE)
MODEL_BATCH = re.compile(r"get model batchsize:\s*(\d+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class BenchConfig(result_files.RunOptions):
    """Options of tools/run_ais_bench.py."""

    device: str = cli.option("0", "device, or several: 0,1,2")
    dym_batch: int | None = cli.option(None, "images per run of a model with gears (ais_bench's --dymBatch)", low=1)
    sweep: str = cli.option("", "convert and measure the .onnx file of --model at these batch sizes: 1,4,8,16,32,64")
    soc_version: str = cli.option("", "chip of --sweep (default: npu-smi is asked)")
    aipp: bool = cli.option(False, "with --sweep: normalize on the device")
    metrics_json: str = cli.option("", "with --sweep: file of postprocess.py whose accuracy goes into the table")

    def __post_init__(self):
        super().__post_init__()
        if not all(part.isdecimal() and int(part) < 256 for part in self.device.split(",")):
            raise UserError(f"--device: {self.device}, must be numbers from 0 to 255, separated by commas")
        if self.sweep and (self.input or self.output):
            raise UserError("--sweep: measures the network alone, without --input and --output")


def main(description, argv=None):
    """Body of tools/run_ais_bench.py."""
    with cli.exit_on_error():
        config, _ = cli.parse(BenchConfig(), description, argv)
        if not config.model:
            raise UserError("--model: missing")
        if config.sweep:
            print(sweep(config))
        else:
            run(config)


def run(config):
    """Run an OM file over a data set, or over made-up data.

    Returns:
      Images per second of the network alone, over all devices.
    Raises:
      UserError: what ais_bench would refuse, or take and compute nonsense from. RunError: it failed or left a hole.
    """
    model = pathlib.Path(config.model)
    if not model.is_file() or model.suffix != ".om":
        raise UserError(f"--model: {model} is no .om file; make it with tools/run_atc.py")
    _check_path("--model", model)
    engines.require_ais_bench()
    facts = _model_facts(model)
    batch = _check_batch(config, facts)
    files = _check_inputs(config, facts) if config.input else []
    folder = summary = None
    if config.output:
        config = dataclasses.replace(config, output_dirname=config.output_dirname or time.strftime("%Y_%m_%d-%H_%M_%S"))
        folder, summary = result_files.claim_output(config.output, config.output_dirname)
        _check_path("--output", folder)
    command = bench_command(config)
    print(" ".join(command), flush=True)
    environment = os.environ | {"PYTHONUTF8": "1"}  # its 2023 version does not start in an ASCII locale
    status, printed = _echoed(command, environment)
    if status != 0:
        raise RunError(
            f"ais_bench: exit status {status}, {_reason(printed)}"
            + (f"; {folder} is incomplete, remove it" if folder else "")
        )
    _check_batching(printed, batch)
    summaries = _read_summaries(folder, summary) if folder else []
    if files and folder:
        _check_results(files, folder, summaries)
    return _throughput(printed, summaries)


def _echoed(command, environment):
    """Run a program, pass its lines on as they come, and return (exit status, everything it printed)."""
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    return process.returncode, "".join(lines)


def bench_command(config):
    """The argument list, in the spelling that all versions since 0.0.2 take."""
    options = {
        "--model": config.model,
        "--input": config.input,
        "--output": config.output,
        "--output_dirname": config.output_dirname,
        "--outfmt": config.outfmt if config.output else "",
        "--batchsize": config.batchsize,
        "--dymBatch": config.dym_batch,
        "--loop": config.loop if config.loop != 1 else "",
        "--warmup_count": config.warmup_count if config.warmup_count != 1 else "",
        "--pure_data_type": config.pure_data_type if config.pure_data_type != "zero" else "",
        "--device": config.device if config.device != "0" else "",
    }
    return [
        sys.executable,
        "-m",
        "ais_bench",
        *(str(word) for option, value in options.items() if value not in ("", None) for word in (option, value)),
    ]


def _model_facts(model):
    """What run_atc noted about the OM file; an empty dict for files of other origin."""
    try:
        return json.loads(atc.facts_file(model).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{atc.facts_file(model)}: {error}; remove it") from error


def _check_batch(config, facts):
    """Images per run as far as they are known; ais_bench believes any --batchsize and scales its result by it."""
    own = facts.get("batch")
    if isinstance(own, str):
        if str(config.dym_batch) not in own.split(","):
            raise UserError(f"--dym-batch: {config.dym_batch or 'missing'}, {config.model} was built for {own}")
        own = config.dym_batch
    if own and config.batchsize and config.batchsize != own:
        raise UserError(f"--batchsize: {config.batchsize}, but {config.model} was built for {own}")
    return own or config.dym_batch or config.batchsize


def _check_path(flag, path):
    """ais_bench since 2024 refuses links, other characters, and what others may write."""
    absolute = path.absolute()
    if not SAFE_PATH.fullmatch(str(absolute)):
        raise UserError(f"{flag}: {absolute} has characters other than A-Z a-z 0-9 _ - . which ais_bench refuses")
    if path.is_symlink():
        raise UserError(f"{flag}: {path} is a symbolic link, which ais_bench refuses; give {path.resolve()}")
    if path.exists() and path.stat().st_mode & 0o022:
        raise UserError(f"{flag}: {path} may be written by others, which ais_bench refuses; chmod go-w {path}")


def _check_inputs(config, facts):
    """Names, kinds, numbers and sizes of the input files."""
    folder = pathlib.Path(config.input)
    files = result_files.list_inputs(config.input)
    if folder.is_dir():
        _check_path("--input", folder)
    if len(files) > MAX_FILES:
        raise UserError(f"--input: {len(files)} files in {folder}, ais_bench takes {MAX_FILES}")
    for path in files:
        _check_path("--input", path)
    if "shape" in facts:
        size = int(np.prod(facts["shape"])) * np.dtype(facts["dtype"]).itemsize
        what = f"{facts['dtype']} {'x'.join(map(str, facts['shape']))}"
    else:
        size, what = result_files.sample_bytes(files[0]), f"as {files[0].name} does"
    if size > MAX_BYTES:
        raise UserError(f"--input: {files[0]} has {size} bytes, ais_bench takes {MAX_BYTES}")
    result_files.check_sizes(files, size, what)
    if files[0].suffix.lower() == ".npy" and "dtype" in facts:
        for path in files:
            found = np.load(path, mmap_mode="r", allow_pickle=False).dtype
            if found != facts["dtype"]:
                raise UserError(
                    f"--input: {path} holds {found}, the model takes {facts['dtype']}; ais_bench would not convert it"
                )
    return files


def _check_batching(output, batch):
    """Bytes that divide are all ais_bench asks for: float32 files in a uint8 model pass, with fewer files per run."""
    own = MODEL_BATCH.search(output)
    if own and batch and int(own.group(1)) != batch:
        raise UserError(
            f"--batchsize: {batch}, but the model was built for {own.group(1)}; the printed throughput is "
            "wrong by that ratio"
        )
    batch = batch or (int(own.group(1)) if own else None)
    per_batch = PER_BATCH.search(output)
    if per_batch and batch and int(per_batch.group(1)) != batch:
        raise UserError(
            f"--input: ais_bench took {per_batch.group(1)} files for a run of {batch} images, so the files "
            "are of another type than the model's input (float32 or uint8?); its results mean nothing"
        )


def _read_summaries(folder, summary):
    """All summary files of the run, whichever way this version spells and places them."""
    beside = folder.absolute()
    candidates = {summary, *beside.parent.glob(f"{beside.name}_sum*ary.json"), *beside.glob("*sum*ary.json")}
    found = [path for path in sorted(candidates) if path.is_file()]
    if not found:
        raise RunError(
            f"ais_bench: ended without a summary beside or in {folder}, so it failed on the way; its "
            "results are incomplete, remove them"
        )
    try:
        return [json.loads(path.read_text()) for path in found]
    except (OSError, ValueError) as error:
        raise RunError(f"ais_bench: {found[0]} is not readable ({error})") from error


def _check_results(files, folder, summaries):
    """Every input file must have its result, not empty, and nothing else may lie there."""
    written = {
        path.name.partition(".")[0].rpartition("_")[0]
        for path in folder.rglob("*_0.*")
        if path.suffix in (".txt", ".bin", ".npy") and path.stat().st_size
    }
    wanted = {path.name.partition(".")[0] for path in files}
    missing = sorted(wanted - written)
    if missing:
        raise RunError(f"ais_bench: no result for {len(missing)} of {len(files)} inputs, the first is {missing[0]}")
    listed = sum(len(summary.get("filesinfo", {})) for summary in summaries)
    if listed < len(wanted):
        raise RunError(f"ais_bench: its summary lists {listed} results of {len(files)} inputs; the run is incomplete")


def _throughput(output, summaries):
    """Images per second: the sum over devices, else the summary's, else the printed line's."""
    summed, line = SUMMED.search(output), THROUGHPUT.search(output)
    if summed:
        return float(summed.group(1))
    if summaries and "throughput" in summaries[0]:
        return sum(float(summary["throughput"]) for summary in summaries)
    if line:
        return float(line.group(1))
    raise RunError(f"ais_bench: printed no throughput; its last line is {_reason(output)}")


def _reason(output):
    """The line that says most about a failure: the exception, else the last [ERROR], else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["nothing was printed"]
    errors = [line for line in lines if re.search(r"Error\b|\[ERROR\]", line, re.IGNORECASE)]
    return (errors or lines)[-1]


def sweep(config):
    """Convert an ONNX file for each batch size, measure each, and return the table as Markdown."""
    sizes = atc.numbers("--sweep", config.sweep)
    engines.require_ais_bench()
    built = atc.convert(
        atc.AtcConfig(model=config.model, batch=config.sweep, soc_version=config.soc_version, aipp=config.aipp)
    )
    accuracy = _accuracy(config.metrics_json) if config.metrics_json else "-"
    chip = _model_facts(built[sizes[0]])["soc_version"]
    rates = {}
    for size in sizes:
        rates[size] = run(
            dataclasses.replace(config, model=str(built[size]), sweep="", batchsize=size, loop=max(config.loop, 100))
        )
    best = max(rates, key=rates.get)
    rows = [f"| {chip} | {size} | ILSVRC2012 | {accuracy} | {rate:.1f} fps |" for size, rate in rates.items()]
    return "\n".join(
        [
            "| Chip | BatchSize | Data set | Accuracy | Performance |",
            "|---|---|---|---|---|",
            *rows,
            f"best: batch size {best}, {rates[best]:.1f} fps",
        ]
    )


def _accuracy(path):
    try:
        pairs = {item["key"]: item["value"] for item in json.loads(pathlib.Path(path).read_text())["value"]}
        return f"Top1@Acc={pairs['Top1 accuracy']} Top5@Acc={pairs['Top5 accuracy']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--metrics-json: {path} is not a file of postprocess.py ({error})") from error
