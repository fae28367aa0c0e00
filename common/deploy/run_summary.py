"""The summary that ends a run of ais_bench or run_onnx.py, and whether results are those of one finished run.

ais_bench never removes old results, and a run that fails leaves what it has written and no summary.
"""

import json
import math
import os
import pathlib
import re
import time
import typing
from collections.abc import Mapping, Sequence

from common.errors import UserError

SUMMARY = re.compile(r"(.*?)_?(?:summary|sumary)\.json")  # the latter in old versions


class RunSummary(typing.NamedTuple):
    """One run on one device.

    Attributes:
      samples: number of its input files.
      listed: names of its result files.
      options: of its command line, without dashes and in lower case: {"model": "net.om", "dymbatch": "4"}.
      command: its command line.
      runs: executions of the network; 0: not known.
      batch: images of each, as the run was told or found out; 0: not known.
      throughput: images per second of the network alone; 0: not known.
    """

    path: pathlib.Path
    modified_ns: int
    samples: int
    listed: frozenset[str]
    options: Mapping[str, str]
    command: tuple[str, ...]
    runs: int
    batch: int
    throughput: float

    def __str__(self) -> str:
        return f"{self.path} ({self.options.get('model', 'model not known')}, {_clock(self.modified_ns)})"


def _clock(time_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns / 1e9))


def read(path: pathlib.Path) -> RunSummary:
    """Read a summary; UserError for a file that is none."""
    try:
        content = json.loads(path.read_text())
        samples = content.get("filesinfo", {}).values()
        listed = {os.path.basename(out) for info in samples for out in info["outfiles"]}
        command = tuple(map(str, content.get("args", ())))
        compute = content.get("NPU_compute_time", {})
        runs, mean, fps = (
            float(each) for each in (compute.get("count", 0), compute.get("mean", 0), content.get("throughput", 0))
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a summary of ais_bench ({error}); the run may have been stopped") from error
    options = parse_options(command)
    loops = options.get("loop", options.get("l", "1"))
    is_plain = loops.isdecimal() and not {"pipeline", "threads"} & options.keys()
    return RunSummary(
        path=path,
        modified_ns=path.stat().st_mtime_ns,
        samples=len(samples),
        listed=frozenset(listed),
        options={"model": options["m"], **options} if "m" in options else options,
        command=command,
        runs=round(runs / int(loops)) if is_plain else 0,
        batch=round(fps * mean / 1000),
        throughput=fps,
    )


def parse_options(command: Sequence[str]) -> dict[str, str]:
    """Options of a command line in any spelling; a switch has an empty value."""
    options: dict[str, str] = {}
    name = ""
    for word in command[1:]:
        if word.startswith("-"):
            name, _, value = word.lstrip("-").replace("-", "_").lower().partition("=")
            options[name] = value
        elif name:
            options[name], name = word, ""
    return options


def of_folder(folder: pathlib.Path) -> list[RunSummary]:
    """Summaries in and beside a folder of results."""
    folder = folder.resolve()
    found = []
    for parent, wanted in ((folder, None), (folder.parent, folder.name)):
        for path in sorted(parent.iterdir()):
            match = SUMMARY.fullmatch(path.name)
            # One that is named after a folder belongs to that folder.
            if match and (match[1] == wanted if wanted else not (match[1] and (folder / match[1]).is_dir())):
                found.append(read(path))
    return found


def result_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """A folder of results, and those of the devices in it."""
    return [folder, *sorted(path for path in folder.glob("device*") if path.is_dir())]


def check_one_run(
    argument: str, results: Mapping[pathlib.Path, Sequence[str]], flag: str = "--infer-results: "
) -> None:
    """Check that results are those of one run that ended.

    Args:
      argument: the folder as it was given.
      results: folder -> paths of its result files: one folder, or one for each device.
      flag: that names the folder, for messages.
    Raises:
      UserError: results of two runs, or of a run that did not end.
    """
    found = {folder: of_folder(folder) for folder in results}
    known = {folder: summaries[0] for folder, summaries in found.items() if summaries}
    two_runs = next((summaries[:2] for summaries in found.values() if len(summaries) > 1), None)
    if not known:
        print(f"note: {argument} has no summary, by which results of an unfinished run would be noticed", flush=True)
        return
    first_folder, first = next(iter(known.items()))
    for folder in results:
        if folder not in known:
            raise UserError(
                f"{flag}{folder} has no summary, so its run did not finish; that of {first_folder} did, "
                f"{first}; {_REMEDY}"
            )
        is_other = known[folder].command != first.command or (
            folder != first_folder and pathlib.Path(argument) in results
        )
        two_runs = two_runs or ([first, known[folder]] if is_other else None)
    if two_runs:
        raise UserError(f"{flag}{argument} holds the results of two runs, {two_runs[0]} and {two_runs[1]}; {_REMEDY}")
    for folder, paths in results.items():
        _check_files(folder, paths, known[folder], flag)


_REMEDY = "run again into an empty folder"


def _check_files(folder: pathlib.Path, paths: Sequence[str], summary: RunSummary, flag: str) -> None:
    """Raise UserError for results that the run of a summary did not write."""
    foreign = [path for path in paths if os.path.basename(path) not in summary.listed] if summary.listed else []
    if foreign:
        raise UserError(
            f"{flag}{len(foreign)} files of {folder} are not in the summary of the run, {summary}, so "
            f"they are of another one, for example {_dated(foreign[0])}; remove them"
        )
    newer = [path for path in paths if os.stat(path).st_mtime_ns > summary.modified_ns]
    if newer:
        raise UserError(
            f"{flag}{len(newer)} files of {folder} are newer than the summary of the run, {summary}, so "
            f"they are of another one that did not finish, for example {_dated(newer[0])}; {_REMEDY} (a copy must "
            "keep the times: cp -a)"
        )
    expected = math.ceil(summary.samples / summary.batch) if summary.batch else 0
    # The rows of TXT and NPY files are counted when they are read.
    if paths[0].lower().endswith(".bin") and expected and summary.runs and summary.runs != expected:
        raise UserError(
            f"{flag}{folder}: the run {summary} took {summary.runs} executions for {summary.samples} files, "
            f"{summary.batch} images each; a file holds several rows, or --batchsize was not the model's; {_REMEDY}"
        )


def _dated(path: str) -> str:
    return f"{path} of {_clock(os.stat(path).st_mtime_ns)}"
