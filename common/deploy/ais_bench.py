"""run_ais_bench.py: runs `python -m ais_bench`, and reports the errors that it passes over with exit status 0."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from common import cli, processes
from common.deploy import atc, file_names, front_end, om_metadata, result_files, run_summary
from common.deploy.run_summary import RunSummary
from common.device import cann_failure
from common.errors import RunError, UserError
from common.evaluation import om_session
from common.evaluation.om_session import OmMetadata

# Lines that ais_bench prints.
THROUGHPUT = re.compile(
    r"throughput\s+1000\*batchsize\.mean\([^)]*\)/NPU_compute_time\.mean\([^)]*\):\s*([0-9.eE+-]+)", re.IGNORECASE
)
TOTAL_THROUGHPUT = re.compile(r"summary throughput:\s*([0-9.eE+-]+)", re.IGNORECASE)
FILES_PER_BATCH = re.compile(r"filesperbatch:\s*(\d+)\s+runcount", re.IGNORECASE)
MODEL_BATCH = re.compile(r"get model batchsize:\s*(\d+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class AisBenchConfig(result_files.InferenceConfig):
    """Options of tools/run_ais_bench.py."""

    device: str = cli.option("0", "device, or several: 0,1,2")
    dym_batch: int | None = cli.option(
        None, "images per run of a model with dynamic batch sizes (ais_bench's --dymBatch)", low=1
    )
    sweep: str = cli.option("", "convert and measure the .onnx file of --model at these batch sizes: 1,4,8,16,32,64")
    soc_version: str = cli.option("", "chip of --sweep (default: npu-smi is asked)")
    aipp: bool = cli.option(False, "with --sweep: normalize on the device")
    metrics_json: str = cli.option("", "with --sweep: file of postprocess.py whose accuracy goes into the table")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(part.isdecimal() and int(part) < 256 for part in self.device.split(",")):
            raise UserError(f"--device: {self.device}, must be numbers from 0 to 255, separated by commas")
        if self.sweep and (self.input or self.output):
            raise UserError("--sweep: measures the network alone, without --input and --output")


def main(description: str) -> None:
    """Body of tools/run_ais_bench.py."""
    with cli.exit_on_error():
        config, _ = cli.parse(AisBenchConfig(), description)
        if config.sweep:
            print(sweep(config))
        else:
            run(config)


def run(config: AisBenchConfig) -> float:
    """Run an OM file over input files, or over synthetic input.

    Returns:
      Images per second of the network alone, over all devices.
    Raises:
      UserError: what ais_bench would refuse, or accept and compute wrong results from. RunError: it failed, or results
        are missing.
    """
    model = pathlib.Path(config.model)
    if model.suffix != ".om":
        raise UserError(f"--model: {model} is no .om file; make it with tools/run_atc.py")
    if not model.is_file():
        raise UserError(f"--model: {model} does not exist; make it with tools/run_atc.py")
    front = front_end.installed()
    front.check_readable("--model", model)
    metadata = om_session.read_record(model) or om_metadata.ask(model, int(config.device.split(",")[0]))
    batch = _resolve_batch(config, metadata)
    files = _check_inputs(config, metadata, front) if config.input else []
    folder = None
    with contextlib.ExitStack() as stack:
        if config.output:
            dirname = config.output_dirname or time.strftime("%Y_%m_%d-%H_%M_%S")
            config = dataclasses.replace(config, output_dirname=dirname)
            front.check_output(config.output, dirname)
            folder, _ = stack.enter_context(result_files.output_folder(config.output, dirname))
            front.check_readable("--output-dirname", folder)
        command = bench_command(config, front)
        print(" ".join(command), flush=True)
        status, output = _run_streaming(command)
    if status != 0:
        incomplete = f"; {folder} is incomplete, remove it" if folder else ""
        raise RunError(f"ais_bench: exit status {status}, {cann_failure.explain(output)}{incomplete}")
    _check_batching(output, batch)
    summaries = _read_summaries(folder) if folder else []
    if files and folder:
        _check_results(files, folder, summaries)
    return _throughput(output, summaries)


def _run_streaming(command: list[str]) -> tuple[int, str]:
    """Run a program, print its lines as they come, and return (exit status, all of its output)."""
    lines = []
    environment = os.environ | front_end.ENVIRONMENT
    with processes.program(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    return process.returncode, "".join(lines)


def bench_command(config: AisBenchConfig, front: front_end.FrontEnd) -> list[str]:
    """The arguments in the spelling of the installed front end; defaults are left out."""
    options = {
        "model": config.model,
        "input": config.input,
        "output": config.output,
        "output_dirname": config.output_dirname,
        "outfmt": config.outfmt if config.output else "",
        "batchsize": config.batchsize,
        "dymBatch": config.dym_batch,
        "loop": config.loop if config.loop != 1 else "",
        "warmup_count": config.warmup_count if config.warmup_count != 1 else "",
        "pure_data_type": config.pure_data_type if config.pure_data_type != "zero" else "",
        "device": config.device if config.device != "0" else "",
    }
    if config.input and "," in config.device and front.spelled("divide_input"):
        options["divide_input"] = True  # else every device runs the whole input
    given = {name: value for name, value in options.items() if value not in ("", None)}
    return [sys.executable, "-m", "ais_bench", *front.arguments(given)]


def _resolve_batch(config: AisBenchConfig, metadata: OmMetadata) -> int | None:
    """Images per run, None where unknown; ais_bench accepts any --batchsize and scales its throughput by it.

    Raises:
      UserError: --batchsize or --dym-batch that the model does not have.
    """
    built_for = metadata.get("batch")
    if isinstance(built_for, int):
        if config.dym_batch:
            raise UserError(f"--dym-batch: {config.dym_batch}, but {config.model} has the fixed batch size {built_for}")
        return config.resolve_batch(built_for)
    largest = metadata.get("largest_batch", config.dym_batch or 0)
    known = config.dym_batch and (
        config.dym_batch <= largest if built_for is None else str(config.dym_batch) in built_for.split(",")
    )
    if not known:
        sizes = built_for or f"several batch sizes, the largest is {largest or 'not known'}"
        raise UserError(f"--dym-batch: {config.dym_batch or 'missing'}, {config.model} was built for {sizes}")
    return config.resolve_batch(config.dym_batch)


def _check_inputs(config: AisBenchConfig, metadata: OmMetadata, front: front_end.FrontEnd) -> list[pathlib.Path]:
    """The input files, after checks of their number, names, sizes and types."""
    files = result_files.list_inputs(config.input)
    result_files.check_network(files, metadata.get("arch", ""))
    if "shape" in metadata:
        size = metadata.get("sample_bytes") or int(np.prod(metadata["shape"])) * np.dtype(metadata["dtype"]).itemsize
        description = f"{metadata.get('dtype', 'numbers')} {'x'.join(map(str, metadata['shape']))}"
    else:
        size, description = result_files.sample_bytes(files[0]), f"as {files[0].name} does"
    front.check_inputs(config.input, files, size)
    front.check_devices(len(files), len(config.device.split(",")))
    result_files.check_sizes(files, size, description)
    if "shape" in metadata:
        result_files.check_layout(files, metadata["shape"])
    if files[0].suffix.lower() == ".npy" and "dtype" in metadata:
        for path in files:
            dtype = np.load(path, mmap_mode="r", allow_pickle=False).dtype
            if dtype != metadata["dtype"]:
                raise UserError(
                    f"--input: {path} holds {dtype}, the model takes {metadata['dtype']}; ais_bench does not convert it"
                )
    return files


def _check_batching(output: str, batch: int | None) -> None:
    """Raise UserError where ais_bench combined files wrongly.

    It checks only that bytes divide: float32 files in a uint8 model pass, with a quarter of the files per run.
    """
    found = MODEL_BATCH.search(output)
    model_batch = int(found[1]) if found else None
    if model_batch and batch and model_batch != batch:
        raise UserError(
            f"--batchsize: {batch}, but the model was built for {model_batch}; the printed throughput is "
            "wrong by that ratio"
        )
    expected, found = batch or model_batch, FILES_PER_BATCH.search(output)
    if found and expected and int(found[1]) != expected:
        raise UserError(
            f"--input: ais_bench took {found[1]} files for a run of {expected} images, so the files are of another "
            "type than the model's input (float32, float16 or uint8?) and its results are wrong"
        )


def _read_summaries(folder: pathlib.Path) -> list[RunSummary]:
    """The summary of the run, or one of each device; name and place depend on the front end."""
    found = [each for path in run_summary.result_folders(folder) for each in run_summary.of_folder(path)]
    if not found:
        raise RunError(
            f"ais_bench: ended without a summary beside or in {folder}, so it did not finish; its results are "
            "incomplete, remove them"
        )
    return found


def _check_results(files: Sequence[pathlib.Path], folder: pathlib.Path, summaries: list[RunSummary]) -> None:
    """Raise RunError unless every input file has a result that is not empty, and the summaries list as many."""
    written = {
        file_names.stem(path.name).rpartition("_")[0]
        for path in folder.rglob("*_0.*")
        if path.suffix in (".txt", ".bin", ".npy") and path.stat().st_size
    }
    wanted = {file_names.stem(path.name) for path in files}
    missing = sorted(wanted - written)
    if missing:
        raise RunError(f"ais_bench: no result for {len(missing)} of {len(files)} inputs, the first is {missing[0]}")
    listed = sum(summary.samples for summary in summaries)
    if listed < len(wanted):
        raise RunError(f"ais_bench: its summary lists {listed} results of {len(files)} inputs; the run is incomplete")


def _throughput(output: str, summaries: list[RunSummary]) -> float:
    """Images per second: the printed total of several devices, else from the summaries, else the printed line."""
    total, line = TOTAL_THROUGHPUT.search(output), THROUGHPUT.search(output)
    if total:
        return float(total[1])
    if summaries and summaries[0].throughput:
        return sum(summary.throughput for summary in summaries)
    if line:
        return float(line[1])
    raise RunError(f"ais_bench: printed no throughput; {cann_failure.explain(output)}")


def sweep(config: AisBenchConfig) -> str:
    """Convert an ONNX file for each batch size, measure each, and return the table as Markdown."""
    sizes = atc.parse_batch_sizes("--sweep", config.sweep)
    front_end.installed()
    built = atc.convert(
        atc.AtcConfig(model=config.model, batch=config.sweep, soc_version=config.soc_version, aipp=config.aipp)
    )
    accuracy = _read_accuracy(config.metrics_json) if config.metrics_json else "-"
    soc_version = om_session.read_record(built[sizes[0]])["soc_version"]
    fps = {}
    for size in sizes:
        fps[size] = run(
            dataclasses.replace(config, model=str(built[size]), sweep="", batchsize=size, loop=max(config.loop, 100))
        )
    best = max(sizes, key=fps.__getitem__)
    rows = [f"| {soc_version} | {size} | ILSVRC2012 | {accuracy} | {fps[size]:.1f} fps |" for size in sizes]
    return "\n".join(
        [
            "| Chip | BatchSize | Data set | Accuracy | Performance |",
            "|---|---|---|---|---|",
            *rows,
            f"best: batch size {best}, {fps[best]:.1f} fps",
        ]
    )


def _read_accuracy(path: str) -> str:
    try:
        pairs = {item["key"]: item["value"] for item in json.loads(pathlib.Path(path).read_text())["value"]}
        return f"Top1@Acc={pairs['Top1 accuracy']} Top5@Acc={pairs['Top5 accuracy']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--metrics-json: {path} is not a file of postprocess.py ({error})") from error
