"""postprocess.py of every model: result files and a label file -> exact top-1..top-5 accuracy and metrics.json.

Results are read one task at a time; only the name of each image is kept. Imports no torch. Legend: N batch, K column.
"""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from common import cli, files, parallel
from common.data import labels
from common.data.file_tree import is_hidden, nfc
from common.deploy import file_names, run_summary
from common.errors import UserError
from common.evaluation import metrics_json
from common.evaluation.metrics import Counts, label_ranks, num_shifted_hits
from common.progress import Progress
from common.spec import ModelSpec

FILES_PER_TASK = 64
SUFFIXES = (".txt", ".npy", ".bin")
MAX_LISTED = 5

Item = tuple[str, int]  # path of a result, label as a column of it


@dataclasses.dataclass(frozen=True)
class PostprocessConfig:
    """Options of the postprocess scripts."""

    infer_results: str = cli.option(
        "", "folder of result files, TXT, NPY or BIN", required="the folder of result files"
    )
    anno_file: str = cli.option(
        "", "label file, a line NAME INDEX per image, INDEX from 0", required="the label file, often val_label.txt"
    )
    label_numbers: str = labels.numbers_option()
    metrics_json: str = cli.option("metrics.json", "file to write the accuracies to")
    allow_missing: bool = cli.option(False, "score the images that have results, and count the others")
    num_classes: int | None = cli.option(None, "columns of the results (default: the public weights')", low=1)
    workers: int = cli.option(0, "processes; 0 is one per core", low=0)

    def __post_init__(self) -> None:
        cli.check_ranges(self)


def main(spec: ModelSpec, description: str) -> None:
    """Body of a model's postprocess script."""
    with cli.exit_on_error():
        config, _ = cli.parse(PostprocessConfig(), description)
        files.check_file(config.metrics_json, "--metrics-json")
        files.check_distinct(config.metrics_json, "--metrics-json", {"--anno-file": config.anno_file})
        counts, num_outputs = score(spec, config)
        metrics_json.write_metrics(config.metrics_json, counts, num_outputs)
        print(metrics_json.format_table(counts))
        print(f"written to {config.metrics_json}")


def score(spec: ModelSpec, config: PostprocessConfig) -> tuple[Counts, int]:
    """Score a folder of results.

    Returns:
      (Counts, number of columns); Counts.skipped is the number of labelled images without a result.
    Raises:
      UserError: labels and results that do not fit together, or files that are no results of this network.
    """
    results = find_results(config.infer_results)
    how: dict[str, Any] = dict(numbers=config.label_numbers, images=sorted(results))
    label_of = labels.read(config.anno_file, "--anno-file", key=lambda name: nfc(file_names.stem(name)), **how)
    unknown = sorted(results.keys() - label_of.keys())
    if unknown:
        raise UserError(f"--anno-file: {config.anno_file} has no label for {_abbreviate(unknown)}")
    missing = sorted(label_of.keys() - results.keys())
    if missing and not config.allow_missing:
        raise UserError(
            f"--infer-results: {config.infer_results} has no result for {_abbreviate(missing)}; run the "
            "inference again, or give --allow-missing to score the rest"
        )
    public = {spec.num_classes, spec.num_classes + spec.label_offset}
    allowed = {config.num_classes} if config.num_classes else public
    _raise_on_partial_parse()
    num_outputs = len(read_row(next(iter(results.values())), allowed))
    offset = spec.background_columns(num_outputs)
    items = [(path, label_of[name] + offset) for name, path in results.items()]
    labels.check_range([label_of[name] for name in results], num_outputs - offset, config.anno_file)
    counts = Counts(skipped=len(missing), num_classes=num_outputs)
    tasks = [(items[i : i + FILES_PER_TASK], num_outputs) for i in range(0, len(items), FILES_PER_TASK)]
    with Progress(len(items), "results") as advance:
        for ranks_N, num_shifted in parallel.imap_unordered(_rank_results, tasks, config.workers):
            counts.add_ranks(ranks_N, num_shifted)
            advance(len(ranks_N))
    if note := counts.note_on_labels(min(label_of.values())):
        print(note, flush=True)
    return counts, num_outputs


def _abbreviate(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{len(names)} images: {', '.join(names[:MAX_LISTED])}{more}"


def find_results(argument: str, flag: str = "--infer-results: ") -> dict[str, str]:
    """Image name -> path of its result, NAME_0.txt, .npy or .bin.

    Args:
      argument: a folder; its folders device* hold the results of a run on several devices.
      flag: that names the folder, for messages.
    Raises:
      UserError: no results, two kinds of files, two results of one image, or results that are not of one finished run.
    """
    folder = pathlib.Path(argument)
    if not folder.is_dir():
        raise UserError(f"{flag}{folder} is not a folder")
    by_folder = {each: found for each in run_summary.result_folders(folder) if (found := _result_files(each))}
    paths = [path for found in by_folder.values() for path in found]
    suffixes = {path[-4:].lower() for path in paths}
    if not suffixes:
        raise UserError(f"{flag}{folder} has no .txt, .npy or .bin results")
    if len(suffixes) > 1:
        raise UserError(
            f"{flag}{folder} holds {' and '.join(sorted(suffixes))} files; keep the results of one run only"
        )
    results: dict[str, str] = {}
    for path in paths:
        name, _, index = file_names.stem(os.path.basename(path)).rpartition("_")
        if index != "0" or not name:
            raise UserError(f"{path}: not named as a result; expected NAME_0{path[-4:]}, the first output of a network")
        if results.setdefault(nfc(name), path) != path:
            raise UserError(
                f"{path}: a second result for {name} beside {results[nfc(name)]}; when every device ran the "
                "whole input, score one device's folder"
            )
    run_summary.check_one_run(argument, by_folder, flag)
    return results


def _result_files(folder: pathlib.Path) -> list[str]:
    # Plain strings: pathlib would create 50,000 objects and take half a second.
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name[-4:].lower() in SUFFIXES]
        return sorted(entry.path for entry in found if not is_hidden(entry.name))


def _raise_on_partial_parse() -> None:
    """numpy only warns when it stops at a word that is no number."""
    warnings.filterwarnings("error", message="string or file could not be read", category=DeprecationWarning)


def _rank_results(task: tuple[Sequence[Item], int]) -> tuple[np.ndarray, int]:
    """label_ranks and num_shifted_hits of one task: items and their number of columns."""
    items, num_outputs = task
    _raise_on_partial_parse()
    rows_NK = [read_row(path, {num_outputs}) for path, _ in items]
    if len({row.dtype for row in rows_NK}) > 1:  # millionths beside floats, when not every file has six decimals
        rows_NK = [row / 1e6 if row.dtype == np.int64 else row for row in rows_NK]
    logits_NK, labels_N = np.stack(rows_NK), np.array([label for _, label in items])
    return label_ranks(logits_NK, labels_N), num_shifted_hits(logits_NK, labels_N)


def read_row(path: str, allowed: Collection[int]) -> np.ndarray:
    """The logits of one image, up to a factor: only their order counts.

    Args:
      allowed: acceptable numbers of columns.
    Returns:
      array [K]: floats, or int64 millionths where a TXT file has exactly six decimals.
    Raises:
      UserError: unreadable, another number of columns or rows, or a number that is not finite.
    """
    suffix = path[-4:].lower()
    try:
        if suffix == ".txt":
            row = _parse_txt(path)
        else:
            row = _parse_npy(path) if suffix == ".npy" else _parse_bin(path, allowed)
    except (OSError, ValueError, DeprecationWarning) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a result file ({error})") from error
    if len(row) not in allowed:
        raise UserError(
            f"{path}: {len(row)} columns, expected {' or '.join(map(str, sorted(allowed)))}; --num-classes "
            "allows another number"
        )
    if not np.isfinite(row).all():
        raise UserError(
            f"{path}: column {int(np.argmin(np.isfinite(row)))} is NaN or infinite; the model overflowed, "
            "convert it with another --precision-mode"
        )
    return row


def _read_bytes(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)  # takes a quarter of the time of a buffered file object
    try:
        return os.read(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _parse_txt(path: str) -> np.ndarray:
    text = _read_bytes(path)
    data = np.frombuffer(text, np.uint8)
    dots, blanks = np.flatnonzero(data == ord(".")), np.flatnonzero(data == ord(" "))
    if text.count(b"\n") > 1:
        raise UserError(f"{path}: {text.count(10)} rows for one image; run the model with its own batch size")
    fits_int64 = np.diff(blanks, prepend=-1).max(initial=0) < 20
    if len(dots) == len(blanks) and (blanks - dots == 7).all() and fits_int64:
        # "%f " throughout: integers parse three times as fast, and compare exactly
        return np.fromstring(text.replace(b".", b""), np.int64, sep=" ")
    return np.fromstring(text, np.float64, sep=" ")


def _parse_npy(path: str) -> np.ndarray:
    array = np.load(path, allow_pickle=False)
    if array.ndim == 0 or array.size != array.shape[-1]:
        raise UserError(f"{path}: shape {array.shape}, expected the scores of one image")
    return array.reshape(-1)


def _parse_bin(path: str, allowed: Collection[int]) -> np.ndarray:
    """The type is the one, float32 or float16, that gives an allowed number of columns."""
    data = _read_bytes(path)
    for dtype in (np.float32, np.float16):
        if len(data) // np.dtype(dtype).itemsize in allowed and len(data) % np.dtype(dtype).itemsize == 0:
            return np.frombuffer(data, dtype)
    if len(data) % 4 == 0:
        return np.frombuffer(data, np.float32)  # read_row reports the number of columns
    raise UserError(f"{path}: {len(data)} bytes are no float32 numbers")
