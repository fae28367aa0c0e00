"""What the report shows of a run folder: every number is that of config.json, metrics.jsonl or summary.json."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from common import run_folder
from common.errors import UserError
from common.files import StrPath

TRAIN_COLUMNS = ("epoch", "step", "loss", "acc1", "lr", "fps")
VAL_COLUMNS = ("epoch", "step", "loss", "acc1", "acc5", "seen", "skipped")
MAX_RECORDS = 8000  # training records of all runs on a page; 2000 of one


def read(folder: StrPath, num_runs: int = 1) -> dict[str, Any]:
    """One run.

    Args:
      num_runs: runs that share the page; their training records are thinned out together.
    Returns:
      dict of `folder`; `config` and `summary` as in the files, None where there is none; `train` and `val`:
      {column: values}, the records of metrics.jsonl, and their `position` in epochs; `train_records`: their number
      before thinning out; `bad_images`: [{path, reason}]; `unread`: lines of metrics.jsonl that are no records.
    Raises:
      UserError: no folder of a run, or a file of it that cannot be read.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"RUN: {folder} is not a folder; give the folder that a training names in its first line")
    if not (folder / run_folder.METRICS).is_file():
        raise UserError(f"RUN: {folder} holds no {run_folder.METRICS}; give the folder of a training with a first step")
    records, unread = _records(folder / run_folder.METRICS)
    train = _latest([record for record in records if record["kind"] == "train"])
    shown = _thinned(train, min(2000, MAX_RECORDS // num_runs))
    val = _latest([record for record in records if record["kind"] == "val"])
    steps_per_epoch = max((record["step"] for record in [*train, *val]), default=1) or 1
    return {
        "folder": str(folder),
        "config": _content(folder / run_folder.CONFIG),
        "summary": _content(folder / run_folder.SUMMARY),
        "train": _columns(shown, TRAIN_COLUMNS, steps_per_epoch),
        "train_records": len(train),
        "val": _columns(val, VAL_COLUMNS, steps_per_epoch),
        "bad_images": [
            {"path": record["path"], "reason": record["reason"]} for record in records if record["kind"] == "bad_image"
        ],
        "unread": unread,
    }


def options_that_differ(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[list[Any]]:
    """[option, value, recipe's value] of the options of a run that are not those of its recipe."""
    compared = [name for name in config if name not in ("arch", "recipe")]
    return [[name, config[name], recipe.get(name)] for name in compared if config[name] != recipe.get(name)]


def _content(path: pathlib.Path) -> dict[str, Any] | None:
    return read_json(path, "RUN", dict) if path.is_file() else None


def read_json(path: StrPath, flag: str, kind: type = list) -> Any:
    """A list or dict; UserError for a file that holds none."""
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {path} cannot be read as JSON ({error})") from error
    if not isinstance(content, kind):
        raise UserError(f"{flag}: {path} holds another kind of JSON than expected")
    return content


def _records(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """(records, number of other lines: a killed run leaves a torn one)."""
    found, unread = [], 0
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        try:
            record = json.loads(line)
            record["kind"]
        except (ValueError, TypeError, KeyError):
            unread += 1
        else:
            found.append(record)
    return found, unread


def _latest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In order of steps; of a step that a resumed run repeated, the last record."""
    by_step = {(record["epoch"], record["step"]): record for record in records}
    return [by_step[key] for key in sorted(by_step)]


def _thinned(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` records at equal distances, and the last one of each epoch."""
    stride = math.ceil(len(records) / most)
    following = [*records[1:], {"epoch": None}]
    return [
        record
        for i, (record, after) in enumerate(zip(records, following, strict=True) if records else ())
        if i % stride == 0 or after["epoch"] != record["epoch"]
    ]


def _columns(records: list[dict[str, Any]], names: tuple[str, ...], steps_per_epoch: int) -> dict[str, list[Any]]:
    position = [record["epoch"] - 1 + record["step"] / steps_per_epoch for record in records]  # in epochs
    return {name: [record.get(name) for record in records] for name in names} | {"position": position}
