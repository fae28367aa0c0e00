"""What the report shows besides runs and evaluations: studies, benches, comparisons, batch sweeps."""

import csv
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from common.deploy import run_summary
from common.errors import UserError
from common.evaluation.predictions import csv_rows
from common.files import StrPath
from common.report import runs


def study(path: StrPath) -> dict[str, Any]:
    """Rows of tools/study.py, and curves of validation top-1 over the seeds where the run folders are beside the file.

    Returns:
      dict of `source`; `rows`; `curves`: dicts of recipe, epoch, low, mean, high and seeds, the number of runs.
    Raises:
      UserError: no such file.
    """
    rows = [row for row in runs.read_json(path, "--study") if "seed" in row]
    if not rows:
        raise UserError(f"--study: {path} holds no runs; give the study.json of tools/study.py")
    curves = []
    for recipe in dict.fromkeys(row["name"] for row in rows):
        by_epoch: dict[float, list[float]] = {}
        for row in (each for each in rows if each["name"] == recipe):
            folder = pathlib.Path(path).parent / recipe / f"seed-{row['seed']}"
            if folder.is_dir():
                found = runs.read(folder)["val"]
                for epoch, acc1 in zip(found["position"], found["acc1"], strict=True):
                    by_epoch.setdefault(epoch, []).append(acc1)
        for epoch, values in sorted(by_epoch.items()):
            mean = sum(values) / len(values)
            curves.append(
                dict(recipe=recipe, epoch=epoch, low=min(values), mean=mean, high=max(values), seeds=len(values))
            )
    return {"source": str(path), "rows": rows, "curves": curves}


def benches(path: StrPath) -> dict[str, Any]:
    """Rows of docs/benchmarks.json that are ratios to a peer."""
    rows = [row for row in runs.read_json(path, "--benches") if isinstance(row.get("ratio"), int | float)]
    if not rows:
        raise UserError(f"--benches: {path} holds no ratios; give docs/benchmarks.json")
    return {"source": str(path), "rows": rows}


def comparison(path: StrPath, changes: StrPath, most: int, picture: Callable[[str], str | None]) -> dict[str, Any]:
    """--json of tools/compare.py, and the images of its --changes.

    Args:
      changes: CSV; empty: none.
      most: images to show.
    """
    content = runs.read_json(path, "--comparison", dict)
    if not {"a", "b", "agreed", "layers"} <= content.keys():
        raise UserError(f"--comparison: {path} is no file of tools/compare.py --json")
    changed = []
    if changes:
        try:
            for row in itertools.islice(csv_rows(changes), most):
                numbers = {name: float(row[name]) for name in ("probability_a", "probability_b")}
                changed.append({**row, **numbers, "picture": picture(row["path"])})
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"--changes: {changes} is no file of tools/compare.py --changes ({error})") from error
    return {"source": str(path), **content, "changed": changed}


def sweep(paths: Sequence[StrPath]) -> list[dict[str, Any]]:
    """Batch size and throughput of inference runs, from their summaries."""
    found = []
    for path in paths:
        if not pathlib.Path(path).is_file():
            raise UserError(f"--sweep: {path} is not a file; give the summary.json of inference runs")
        summary = run_summary.read(pathlib.Path(path))
        if not summary.batch or not summary.throughput:
            raise UserError(f"--sweep: {path} states no batch size or throughput")
        model = pathlib.Path(summary.options.get("model", "model")).name
        row = {"model": model, "batch": summary.batch, "images/s": summary.throughput, "file": str(path)}
        found.append(row)
    return sorted(found, key=lambda row: (row["model"], row["batch"]))
