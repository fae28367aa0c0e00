"""Write the result tables of the READMEs and of docs/ from results.json, study.json and docs/benchmarks.json.

    python tools/make_tables.py            rewrite what lies between `<!-- table:NAME -->` and `<!-- /table -->`
    python tools/make_tables.py --check    change nothing; exit status 1 and the list of stale files

docs/benchmarks.md describes the fields of a row.
"""

import dataclasses
import json
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import cli, files
from common.device import versions
from common.errors import UserError

Row = Mapping[str, Any]

# Fields of a row, the same for all tables. A row has at least one of RESULTS.
RESULTS = "acc1 acc1_last acc5 loss fps step_ms ratio zoo".split()
NUMBERS = [
    *RESULTS,
    *"devices batch_size epochs hours minutes seconds image_size eval_size seed pairs baseline fraction".split(),
]
REQUIRED = "source device software commit command".split()
TEXTS = [*REQUIRED, *"name what against stage origin date note unit amp_type options limit".split()]

_BLOCK = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- table:|<!-- /table -->")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      header: its heading.
      value: field of the row, or a function of the row.
      text: str.format pattern; a field without a value becomes `-`.
      bold_max: set the largest value of the column in bold.
    """

    header: str
    value: str | Callable[[Row], str]
    text: str = "{}"
    bold_max: bool = False

    def cells(self, rows: Sequence[Row]) -> list[str]:
        if callable(self.value):
            return [self.value(row) for row in rows]
        values = [row.get(self.value) for row in rows]
        cells = ["-" if value is None else self.text.format(value) for value in values]
        if self.bold_max:
            best = values.index(max(value for value in values if value is not None))
            cells[best] = f"**{cells[best]}**"
        return cells


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: which rows of which file, and how they look.

    Attributes:
      path: JSON file, relative to the repository.
      columns: in order.
      where: values that the fields of a row must have.
      names: show these rows only, in this order; of several with one name, the last in the file.
      transposed: one column for each row of the file.
      read: the rows of a file that holds other things than results.
    """

    path: str
    columns: tuple[Column, ...]
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()
    transposed: bool = False
    read: Callable[[], Sequence[Row]] | None = None

    def render(self) -> str:
        rows = [
            row
            for row in (self.read() if self.read else read_rows(self.path))
            if all(row.get(key) == self.where[key] for key in self.where)
        ]
        if self.names:
            newest = {row["name"]: row for row in rows}
            rows = [newest[name] for name in self.names]
        lines = [[column.header, *column.cells(rows)] for column in self.columns]
        if not self.transposed:
            lines = [list(line) for line in zip(*lines, strict=True)]
        lines.insert(1, ["---"] * len(lines[0]))
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _result(row: Row) -> str:
    """A ratio, or two quantities with their unit."""
    if row.get("ratio") is not None:
        return f"{row['ratio']:.3g}"
    against = f" against {row['baseline']:g} {row['unit']}" if row.get("baseline") is not None else ""
    return f"{row['zoo']:g} {row['unit']}{against}"


def _range(row: Row) -> str:
    return "{:.3g} to {:.3g}".format(*row["range"]) if row.get("range") else "-"


def _limit(row: Row) -> str:
    """What bounds the zoo's side, and the share of it that was reached."""
    reached = f": {100 * row['fraction']:.0f} %" if row.get("fraction") is not None else ""
    return row["limit"] + reached if row.get("limit") else "-"


def _reported_at(row: Row) -> str:
    return f"{row['source']}, {row['date']}"


def _batch(row: Row) -> str:
    return f"{row['batch_size']} ({row['devices']} x {row['batch_size'] // row['devices']})"


def _study_rows(path: str) -> list[Row]:
    """One row for each recipe of a study: mean and spread over its seeds."""
    groups: dict[str, list[Row]] = {}
    for row in read_rows(path):
        groups.setdefault(row["name"], []).append(row)
    return [_over_seeds(rows) for rows in groups.values()]


def _over_seeds(rows: Sequence[Row]) -> Row:
    accuracies, seconds = ([row[field] for row in rows] for field in ("acc1", "seconds"))
    first = rows[0]
    return {
        **{key: first.get(key) for key in ("name", "stage", "what", "device", "source")},
        "given": first["options"],
        "options": f"`{first['options']}`" if first["options"] else "none",
        "epochs": first["epochs"],
        "sizes": "{image_size} / {eval_size}".format(**first),
        "seeds": len(rows),
        "mean": statistics.fmean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(rows) > 1 else None,
        "range": f"{min(accuracies):.2f} to {max(accuracies):.2f}",
        "last": statistics.fmean(row["acc1_last"] for row in rows),
        "seconds": f"{min(seconds):.0f} to {max(seconds):.0f}",
    }


def _overview_rows() -> list[Row]:
    """One row for each model, stage, device and source; of several, the fastest, or the last where none has a speed.

    Of the studies, the recipes as they are, without further options.
    """
    found: list[Row] = []
    for path in sorted(path.relative_to(ROOT) for path in ROOT.glob("*/results.json")):
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in read_rows(str(path)):
            groups.setdefault(tuple(row.get(key) for key in ("stage", "device", "devices", "source")), []).append(row)
        best = [max(rows, key=lambda each: (each.get("fps") or 0, rows.index(each))) for rows in groups.values()]
        study = path.with_name("study.json")
        best += [row for row in _study_rows(str(study)) if not row["given"]] if (ROOT / study).exists() else []
        title = (ROOT / path.with_name("README.md")).read_text().partition("\n")[0].lstrip("# ")
        found += [_overview_row(title, row) for row in best]
    return found


def _overview_row(model: str, row: Row) -> Row:
    stage, fps, devices = row.get("stage") or row["name"], row.get("fps"), row.get("devices") or 1
    if stage == "study":
        stage = f"recipe {row['name']} on {(row['what'] or '-').partition(',')[0]}"
    if row.get("epochs"):
        stage += f", {row['epochs']} epochs"
    if stage == "inference":
        stage += f", batch {row['batch_size']}"
    if fps is None and row.get("step_ms"):
        fps = 1000 * row["batch_size"] / row["step_ms"]
    device = f"{devices} x {row['device']}" if devices > 1 else row["device"]
    source = f"{row['source']}, mean of {row['seeds']} seeds" if row.get("seeds") else row["source"]
    accuracies = {"acc1": row.get("mean", row.get("acc1")), "acc5": row.get("acc5")}
    return {"model": model, "stage": stage, "device": device, "source": source, "fps": fps, **accuracies}


def study_table(path: str) -> "Table":
    """The table of a file that tools/study.py wrote."""
    return Table(
        path,
        (
            Column("Recipe", "name"),
            Column("Options", "options"),
            Column("Epochs", "epochs"),
            Column("Pixels, training / evaluation", "sizes"),
            Column("Seeds", "seeds"),
            Column("Top-1, mean", "mean", "{:.2f} %"),
            Column("Standard deviation", "deviation", "{:.2f}"),
            Column("Min to max", "range"),
            Column("Last epoch, mean", "last", "{:.2f} %"),
            Column("Seconds of a run", "seconds"),
        ),
        read=lambda: _study_rows(path),
    )


_ACCURACY = (Column("Top-1", "acc1", "{:.4g} %"), Column("Top-5", "acc5", "{:.4g} %"))
_COMPARISON = (Column("What", "what"), Column("Against", "against"), Column("Ratio", _result), Column("Range", _range))


def _torch_npu_rows() -> list[Row]:
    return [
        {
            "torch_npu": each.version,
            "torch": each.torch,
            "product": each.product,
            "cann": each.cann,
            "works_with": ", ".join(each.works_with),
            "python": " to ".join(versions.torch_python(each.torch) or ()) or None,
        }
        for each in versions.releases()
    ]


def _supported_rows() -> list[Row]:
    """Releases for the torch that this project takes."""
    rows = _torch_npu_rows()
    return [
        row for row in rows if versions.numbers(row["torch"])[:2] >= versions.MIN_TORCH and "-" not in row["product"]
    ]


def _cann_rows() -> list[Row]:
    return [
        {
            "cann": each.cann,
            "python": each.python and " to ".join(each.python),
            "numpy": each.numpy,
            "opsets": "{} to {}".format(*each.opsets),
        }
        for each in versions.canns()
    ]


_VERSIONS = "common/device/versions.json"
_TORCH_NPU = (
    Column("torch_npu", "torch_npu"),
    Column("torch", "torch"),
    Column("Python", "python"),
    Column("Built for CANN", "cann"),
    Column("Works with CANN", "works_with"),
)

TABLES = {
    "overview": Table(
        "*/results.json",
        (
            Column("Model", "model"),
            Column("Stage", "stage"),
            Column("Device", "device"),
            *_ACCURACY,
            Column("Images/s", "fps", "{:,.0f}"),
            Column("Source", "source"),
        ),
        read=_overview_rows,
    ),
    "inception_v3_study": study_table("inception_v3/study.json"),
    "versions": Table(_VERSIONS, _TORCH_NPU, read=_supported_rows),
    "torch_npu": Table(_VERSIONS, (Column("Release", "product"), *_TORCH_NPU), read=_torch_npu_rows),
    "cann": Table(
        _VERSIONS,
        (
            Column("CANN", "cann"),
            Column("Python", "python"),
            Column("NumPy", "numpy"),
            Column("ONNX opsets of atc", "opsets"),
        ),
        read=_cann_rows,
    ),
    "inception_v3": Table(
        "inception_v3/results.json",
        (
            Column("NAME", "name"),
            Column("Acc@1", "acc1"),
            Column("FPS", "fps"),
            Column("Epochs", "epochs"),
            Column("AMP_Type", "amp_type"),
            Column("Source", "source"),
        ),
    ),
    "inception_v4": Table(
        "inception_v4/results.json",
        (
            Column("Chip", "device"),
            Column("BatchSize", "batch_size"),
            *_ACCURACY,
            Column("Images/s", "fps", bold_max=True),
            Column("Source", "source"),
        ),
    ),
    "xception_training": Table(
        "xception/results.json",
        (
            Column("Parameters", "device"),
            Column("Source", _reported_at),
            Column("Batch size", _batch),
            Column("Epochs", "epochs"),
            Column("Loss", "loss"),
            *_ACCURACY,
            Column("Per step time", "step_ms", "{} ms"),
            Column("Total time", "hours", "{} h"),
        ),
        where={"stage": "training"},
        transposed=True,
    ),
    "xception_evaluation": Table(
        "xception/results.json",
        (
            Column("Parameters", "device"),
            Column("Source", _reported_at),
            Column("Batch size", "batch_size"),
            Column("Loss", "loss", "{:.4f}"),
            *_ACCURACY,
            Column("Total time", "minutes", "{} min"),
        ),
        where={"stage": "evaluation"},
        transposed=True,
    ),
    "speed": Table(
        "docs/benchmarks.json",
        (*_COMPARISON, Column("Device", "device")),
        names=("training_step", "pipeline", "preprocess_float32", "int8_inception_v3", "index_later_start"),
    ),
    "benchmarks": Table(
        "docs/benchmarks.json",
        (
            *_COMPARISON,
            Column("Limit, share reached", _limit),
            Column("Pairs", "pairs"),
            Column("Device", "device"),
            Column("Commit", "commit"),
            Column("Command", "command", "`{}`"),
            Column("Note", "note"),
        ),
    ),
}


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a results file.

    Args:
      path: relative to the repository.
    Raises:
      UserError: a row lacks a field or has an unknown one; the message names file, row and field.
    """
    rows = json.loads((ROOT / path).read_text())
    for number, row in enumerate(rows, 1):
        if problem := _problem(row):
            raise UserError(f"{path}: row {number}: {problem}; docs/benchmarks.md describes the fields")
    return rows


def _problem(row: Row) -> str:
    """What is wrong with a row, or an empty string."""
    for field in REQUIRED:
        if field not in row:
            return f"{field} is missing"
    for field, value in row.items():
        kind = str if field in TEXTS else int | float if field in NUMBERS else list if field == "range" else None
        if kind is None:
            return f"{field} is no field of a row"
        if value is not None and not isinstance(value, kind):
            return f"{field} is {value!r}, must be a {'text' if kind is str else 'list' if kind is list else 'number'}"
    if row["source"] not in ("reported", "measured"):
        return f"source is {row['source']!r}, must be reported or measured"
    if not any(row.get(field) is not None for field in RESULTS):
        return f"no result; give one of {', '.join(RESULTS)}"
    if row.get("fraction") is not None and not row.get("limit"):
        return "fraction without limit; name what it is a share of"
    if row["source"] == "reported":
        return "" if row.get("origin") else "origin is missing; a reported row names its publication"
    if not row["commit"] or not row["command"]:
        return "a measured row needs commit and command"
    return "" if row.get("seed") is not None or row.get("pairs") else "a measured row needs seed, or pairs and range"


def write_rows(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Write a results file, one row per line."""
    files.write_atomic(path, "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")


def commit() -> str:
    """Short hash of the measured commit; `-dirty` where tracked files differ from it, recorded rows excepted."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    rows = (":!docs/benchmarks.json", ":!*/study.json")
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", *rows)
    return git("describe", "--always", "--exclude=*") + ("-dirty" if dirty else "")


def documents() -> list[pathlib.Path]:
    """The files that may hold tables."""
    return [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("*/README*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text: str, path: pathlib.Path) -> str:
    """The text of a document with each table written anew.

    Raises:
      UserError: a marker without its end, or with an unknown name.
    """

    def write(block: re.Match[str]) -> str:
        if block[2] not in TABLES:
            raise UserError(f"{path}: table:{block[2]} is unknown; known are {', '.join(TABLES)}")
        return block[1] + TABLES[block[2]].render() + block[3]

    if len(_MARKER.findall(text)) != 2 * len(_BLOCK.findall(text)):
        raise UserError(f"{path}: a table needs `<!-- table:NAME -->` before it and `<!-- /table -->` behind it")
    return _BLOCK.sub(write, text)


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """Options of make_tables.py."""

    check: bool = cli.option(False, "change nothing; exit status 1 when a table is stale")


def main(argv: Sequence[str] | None = None) -> int:
    config, _ = cli.parse(TableConfig(), __doc__ or "", argv)
    stale = 0
    for path in documents():
        text = path.read_text()
        if (new := with_tables(text, path.relative_to(ROOT))) != text:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'stale; run make tables' if config.check else 'written'}")
            if not config.check:
                files.write_atomic(path, new)
    return int(config.check and stale > 0)


if __name__ == "__main__":
    with cli.exit_on_error():
        sys.exit(main())
