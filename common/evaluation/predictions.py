"""Predictions files of demo.py and eval.py: the five best classes of each image, as CSV or JSON (docs/PREDICTIONS.md).

Rows are written as they come; the file appears whole or not at all. `read` gives the rows back. Needs numpy only.
Legend: N batch, K class.
"""

import codecs
import contextlib
import csv
import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import re
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from common.evaluation.metrics import TOP_K, softmax
from common.files import StrPath, atomic_path, check_file, claimed_file

if typing.TYPE_CHECKING:
    from common.data.batch import Batch
    from common.data.index import FolderIndex
    from common.distributed import Group

FORMATS = (".csv", ".json")
COLUMNS = ["path", "label", "label_index"]
COLUMNS += [f"{name}{k}" for k in range(1, TOP_K + 1) for name in ("class", "index", "probability")]
COLUMNS += ["error"]


@dataclasses.dataclass(frozen=True)
class Guess:
    """A class and its probability; of a model with a background column, index -1 is the background."""

    name: str
    index: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One image.

    Attributes:
      label, label_index: its class; None where it is not known.
      best: the most probable classes, best first; five, or as many as there are; empty where `error` is not.
      error: why the file does not decode.
    """

    path: str
    label: str | None
    label_index: int | None
    best: tuple[Guess, ...]
    error: str = ""

    @property
    def rank(self) -> int | None:
        """Position of the label among the best classes, 0 for a hit at top-1; None where it is not among them."""
        return next((i for i, guess in enumerate(self.best) if guess.index == self.label_index), None)


Write = Callable[[Iterable[Row]], None]


class RowBuilder:
    """Batches and their logits as rows, in the order of the index.

    Args:
      images: their labels are columns of the logits; a negative label is not known.
      names: of the classes, without the background.
      background: columns of the logits before the first class.
    """

    def __init__(self, images: "FolderIndex", names: Sequence[str], background: int = 0) -> None:
        self._images, self._names, self._background = images, names, background

    def __call__(self, batch: "Batch", logits_NK: np.ndarray) -> list[Row]:
        reasons = zip(batch.bad_indices, batch.bad, strict=True)
        rows = [(i, self._row(i, (), reason)) for i, (_, reason) in reasons]
        if len(batch.indices_N):
            logits_NK = np.asarray(logits_NK, np.float64)
            probabilities_NK = softmax(logits_NK)
            best_NK = np.argsort(-logits_NK, axis=1, kind="stable")[:, :TOP_K]  # equal logits: the lower class first
            for i, best, probabilities in zip(batch.indices_N.tolist(), best_NK, probabilities_NK, strict=True):
                rows.append((i, self._row(i, [self._guess(k, probabilities[k]) for k in best.tolist()])))
        return [row for _, row in sorted(rows, key=lambda row: row[0])]

    def _row(self, i: int, best: Sequence[Guess], error: str = "") -> Row:
        index = int(self._images.labels[i]) - self._background
        label, label_index = (self._names[index], index) if index >= 0 else (None, None)
        return Row(self._images.path(i), label, label_index, tuple(best), error)

    def _guess(self, column: int, probability: float) -> Guess:
        index = column - self._background
        return Guess(self._names[index] if index >= 0 else "background", index, float(f"{probability:.6g}"))


# ---- writing ---------------------------------------------------------------------------------------------------------


def check(path: str, flag: str = "--predictions") -> None:
    """Raise UserError unless a predictions file of this name can be written."""
    check_format(path, flag)
    check_file(path, flag)


def check_format(path: StrPath, flag: str = "--predictions") -> None:
    """Raise UserError for a name of another format."""
    if pathlib.Path(path).suffix not in FORMATS:
        raise UserError(f"{flag}: {path}, must end in .csv or .json")


@contextlib.contextmanager
def writer(path: str, flag: str = "--predictions") -> Iterator[Write]:
    """A function that appends rows to the file, which appears at the end of the block unless that raises.

    Raises:
      UserError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with _explained(path, flag):
            stack.enter_context(claimed_file(path, flag))
            draft = stack.enter_context(atomic_path(path))
            file = stack.enter_context(open(draft, "w", encoding="utf-8", newline=""))  # newline: see module csv
            out = (_JsonFormat if path.endswith(".json") else _CsvFormat)(file)

        def write(rows: Iterable[Row]) -> None:
            with _explained(path, flag):
                for row in rows:
                    out.write(row)

        yield write
        with _explained(path, flag):
            out.end()
            file.close()


@contextlib.contextmanager
def writer_of_ranks(path: str, group: "Group") -> Iterator[Write]:
    """`writer` for R ranks, of which rank r gives the rows r, r + R, ...: rank 0 writes all of them in order.

    Each rank keeps its rows in a temporary file until the end of the block, where all ranks must arrive or none. Calls
    give equally many rows on all ranks, but for the last one.

    Raises:
      UserError: on a rank that cannot write; SystemExit on the others.
    """
    if group.world.size == 1:
        with writer(path) as write:
            yield write
        return
    num_calls = 0
    with contextlib.ExitStack() as stack:
        with group.agreed(), _explained(tempfile.gettempdir(), "TMPDIR"):
            write_all = stack.enter_context(writer(path)) if group.world.is_main else None
            spool = stack.enter_context(tempfile.TemporaryFile())

        def keep(rows: Iterable[Row]) -> None:
            nonlocal num_calls
            with _explained(tempfile.gettempdir(), "TMPDIR"):
                pickle.dump(list(rows), spool)
            num_calls += 1

        yield keep
        with group.agreed(), _explained(tempfile.gettempdir(), "TMPDIR"):
            spool.seek(0)
        for call in range(group.all_reduce_max(num_calls)):
            parts = group.all_gather_objects(pickle.load(spool) if call < num_calls else [])
            with group.agreed():
                if write_all is not None:
                    write_all(row for rows in itertools.zip_longest(*parts) for row in rows if row is not None)
        with group.agreed():
            stack.close()


@contextlib.contextmanager
def _explained(path: str, flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be written ({error.strerror}); name a place elsewhere") from error


class _CsvFormat:
    def __init__(self, file: typing.TextIO) -> None:
        # All text is quoted: before Python 3.13 the module leaves a carriage return unquoted.
        self._writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        self._writer.writerow(COLUMNS)

    def write(self, row: Row) -> None:
        best = [value for guess in row.best for value in (_escaped(guess.name), guess.index, guess.probability)]
        best += [""] * (3 * (TOP_K - len(row.best)))
        self._writer.writerow(
            [_escaped(row.path), _escaped(row.label or ""), _or_empty(row.label_index), *best, _escaped(row.error)]
        )

    def end(self) -> None:
        pass


class _JsonFormat:
    def __init__(self, file: typing.TextIO) -> None:
        self._file, self._before = file, "[\n"

    def write(self, row: Row) -> None:
        best = [dict(dataclasses.asdict(guess), name=_escaped(guess.name)) for guess in row.best]
        label = None if row.label is None else _escaped(row.label)
        content = dict(path=_escaped(row.path), label=label, label_index=row.label_index, best=best)
        content["error"] = _escaped(row.error) or None
        self._file.write(self._before + json.dumps(content, ensure_ascii=False))
        self._before = ",\n"

    def end(self) -> None:
        self._file.write("[]\n" if self._before.startswith("[") else "\n]\n")


def _or_empty(number: int | None) -> int | str:
    return "" if number is None else number


def _escaped(text: str) -> str:
    r"""Text that UTF-8 can hold: a byte 0x9c of a file name that is no UTF-8 becomes \udc9c.

    A backslash of a name that holds such characters itself becomes \udc5c.
    """
    text = re.sub(r"\\(?=udc[0-9a-f]{2})", r"\\udc5c", text)
    return text.encode("utf-8", "backslashreplace").decode()


def _unescaped(text: str) -> str:
    return re.sub(r"\\udc([0-9a-f]{2})", lambda match: os.fsdecode(bytes.fromhex(match[1])), text)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(path: StrPath, flag: str = "--predictions") -> Iterator[Row]:
    """The rows of a predictions file, in its order.

    Raises:
      UserError: the file cannot be read, or is none.
    """
    check_format(path, flag)
    try:
        if str(path).endswith(".json"):
            yield from map(_from_json, json.loads(pathlib.Path(path).read_text("utf-8-sig")))
        else:
            yield from map(_from_csv, csv_rows(path))
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError, csv.Error) as error:
        raise UserError(f"{flag}: {path} is no file that --predictions of demo.py or eval.py wrote") from error


def csv_rows(path: StrPath) -> Iterator[dict[str, str]]:
    """The rows of a CSV file of this repository, also where a spreadsheet program has saved it in its own way.

    Raises:
      OSError, ValueError, csv.Error: it cannot be read, or is none.
    """
    with open(path, "rb") as raw:
        encoding = "utf-16" if raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    with open(path, encoding=encoding, newline="") as file:
        heading = file.readline()
        file.seek(0)
        yield from csv.DictReader(file, delimiter=max(",;\t", key=heading.count), strict=True)


def _from_csv(values: dict[str, str]) -> Row:
    best = []
    for k in range(1, TOP_K + 1):
        if values[f"index{k}"]:
            index, probability = int(values[f"index{k}"]), float(values[f"probability{k}"])
            best.append(Guess(_unescaped(values[f"class{k}"]), index, probability))
    label_index = int(values["label_index"]) if values["label_index"] else None
    label = None if label_index is None else _unescaped(values["label"])
    return Row(_unescaped(values["path"]), label, label_index, tuple(best), _unescaped(values["error"]))


def _from_json(content: Any) -> Row:
    best = tuple(Guess(_unescaped(each["name"]), each["index"], each["probability"]) for each in content["best"])
    label = None if content["label"] is None else _unescaped(content["label"])
    return Row(_unescaped(content["path"]), label, content["label_index"], best, _unescaped(content["error"] or ""))
