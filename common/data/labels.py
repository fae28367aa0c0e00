"""Label files: a line `NAME INDEX` per image; indices count from 0, empty lines are ignored.

NAME may have a path, and another suffix or none (`image_names`). Blanks, tabs, commas or semicolons separate the
columns. INDEX may be the name of a class where the classes are known. A file of numbers alone is read only with
--label-numbers: line i then belongs to the i-th image by name.
"""

import collections
import functools
import os
import pathlib
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from common import cli
from common.data.decode import EXTENSIONS
from common.data.file_tree import nfc
from common.errors import UserError
from common.files import StrPath, read_text

# Class index of each ILSVRC2012_ID 1..1000: the numbers of ILSVRC2012_validation_ground_truth.txt follow the devkit's
# meta.mat, not the sorted names of the class folders.
_ILSVRC2012_IDS = pathlib.Path(__file__).with_name("ilsvrc2012_ids.txt")
_GROUND_TRUTH_BEGINS = ["490", "361", "171", "822", "297"]
FROM_0, FROM_1, ILSVRC2012 = NUMBERS = ("from-0", "from-1", "ilsvrc2012-ids")

HOLDS_NO_0 = f"the file holds no label 0: if it counts from 1, give --label-numbers={FROM_1}"

_EXAMPLE = "'ILSVRC2012_val_00000001.JPEG 65'"
_SEPARATOR = r"[\s,;]+"
_NUMBERED = re.compile(rf"(.*\S){_SEPARATOR}[\"']?(\d+)[\"']?", re.DOTALL)
_IMAGE_SUFFIXES = (*EXTENSIONS, ".bin", ".npy", ".xml")
_MORE_COLUMNS = re.compile(rf"({'|'.join(map(re.escape, EXTENSIONS))})[\"']?{_SEPARATOR}", re.IGNORECASE)
_KAGGLE = re.compile(r"PredictionString|n\d{8}( \d+){4}")
_HEADINGS = frozenset("label labels class classes class_id classid category index idx id target y ground_truth".split())


def numbers_option(group: str = "options") -> Any:
    """--label-numbers, for the dataclasses of all programs that read label files."""
    help = "how label files number the classes; ilsvrc2012-ids: as ILSVRC2012_validation_ground_truth.txt does"
    return cli.option(FROM_0, help, choices=NUMBERS, group=group)


class Line(typing.NamedTuple):
    """One line of a label file.

    Attributes:
      number: counted from 1; 0 for an error of the whole file.
      name: image name without a path; empty in a malformed line.
      label: class index; -1 in a malformed line.
      error: what is wrong with the line, or empty.
    """

    number: int
    name: str
    label: int
    error: str


def lines(
    path: StrPath,
    flag: str,
    key: Callable[[str], str] = str,
    classes: Sequence[str] = (),
    numbers: str = FROM_0,
    images: Sequence[str] = (),
) -> Iterator[Line]:
    """Yield the lines of a label file; bad ones have an `error`.

    Args:
      path: label file; names need not be UTF-8.
      flag: option that led to the file.
      key: image name -> what must be unique.
      classes: names of the classes by index, where they are known.
      numbers: value of --label-numbers.
      images: sorted names of the images, for files without names.
    Raises:
      UserError: unreadable.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        yield Line(0, "", -1, str(error))
        return
    rows = [(number, row) for number, row in enumerate(map(str.strip, text.split("\n")), 1) if row]
    nameless = bool(rows) and all(row.isdecimal() for _, row in rows)
    if nameless and (refusal := _nameless_error([row for _, row in rows], numbers, len(images))):
        yield Line(0, "", -1, refusal)
        return
    class_index = {nfc(name): i for i, name in enumerate(classes)}
    if rows and not nameless and _is_heading(rows[0][1], class_index):
        del rows[0]
    first: dict[str, Line] = {}
    for i, (number, row) in enumerate(rows):
        if nameless:
            line = Line(number, images[i], *_index(int(row), numbers))
        else:
            line = _parse(number, row, class_index, numbers)
        if not line.error:
            before = first.setdefault(key(line.name), line)
            if before is not line:
                again = f"{line.name} again with label {line.label} (line {before.number}: {before.label})"
                line = line._replace(error=f"{again}; every image counts once")
        yield line


def read(path: StrPath, flag: str, key: Callable[[str], str] = str, **how: Any) -> dict[str, int]:
    """{key(image name): class index} in the order of the file.

    Args:
      path, flag, key, how: see `lines`.
    Raises:
      UserError: unreadable, empty, a malformed line, or an image that is named twice.
    """
    found = {}
    for line in lines(path, flag, key, **how):
        if line.error:
            raise UserError(f"{path}{f', line {line.number}' if line.number else ''}: {line.error}")
        found[key(line.name)] = line.label
    if not found:
        raise UserError(f"{path}: no labels; expected a line NAME INDEX per image")
    return found


def image_names(names: Collection[str], images: Collection[str]) -> dict[str, str | None]:
    """{name in a label file: the image it means, or None}.

    That is the image of this name, else the only one that differs in Unicode form, in its suffix, or has one more.
    """
    exact, by_stem = set(images), collections.defaultdict(list)
    for image in images if not exact.issuperset(names) else ():
        by_stem[_stem(image)].append(image)

    def image_of(name: str) -> str | None:
        if name in exact:
            return name
        candidates = by_stem[_stem(name)]
        same = [image for image in candidates if nfc(image) == nfc(name)] or candidates
        return same[0] if len(same) == 1 else None

    return {name: image_of(name) for name in names}


def check_range(labels: Collection[int], num_classes: int, path: StrPath) -> None:
    """Raise UserError for a label that is no class."""
    if (largest := max(labels)) >= num_classes:
        hint = f"; {HOLDS_NO_0}" if min(labels) > 0 and largest == num_classes else ""
        raise UserError(f"{path}: label {largest}, the classes are 0..{num_classes - 1}{hint}")


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return nfc(stem if suffix.lower() in _IMAGE_SUFFIXES else name)


def _nameless_error(rows: Sequence[str], numbers: str, num_images: int) -> str:
    """Why a file of numbers alone cannot be read, or an empty text."""
    is_devkit = list(rows[: len(_GROUND_TRUTH_BEGINS)]) == _GROUND_TRUTH_BEGINS
    if numbers == FROM_0 or (is_devkit and numbers != ILSVRC2012):
        kind = f"--label-numbers={ILSVRC2012}" + ("" if is_devkit else f" for that file, --label-numbers={FROM_1}")
        return (
            "holds one number a line and no image names, as ILSVRC2012_validation_ground_truth.txt does, whose numbers "
            f"are not positions of class folders; give {kind}, or write lines NAME INDEX"
        )
    if len(rows) != num_images:
        return f"holds {len(rows)} numbers without image names, but there are {num_images} images; they must be as many"
    return ""


def _is_heading(row: str, class_index: Mapping[str, int]) -> bool:
    words = [word.strip("\"'") for word in re.split(_SEPARATOR, row)]
    return len(words) == 2 and words[1].casefold() in _HEADINGS and nfc(words[1]) not in class_index


def _parse(number: int, row: str, class_index: Mapping[str, int], numbers: str) -> Line:
    """A line of two columns."""
    name, label, error = "", -1, ""
    for separator in re.finditer(_SEPARATOR, row) if class_index else ():
        word = nfc(row[separator.end() :].strip("\"'"))
        if word in class_index and not word.isdecimal():
            name, label = row[: separator.start()], class_index[word]
            break
    else:
        if match := _NUMBERED.fullmatch(row):
            name, (label, error) = match[1], _index(int(match[2]), numbers)
    name = name.rstrip(" ,;\t").strip("\"'").replace("\\", "/").rpartition("/")[2]
    if not name or _KAGGLE.search(row) or (_MORE_COLUMNS.search(name) and not name.lower().endswith(EXTENSIONS)):
        error = _malformed(row, class_index)
    return Line(number, "" if error else name, -1 if error else label, error)


def _index(number: int, numbers: str) -> tuple[int, str]:
    """(class index, error) of a number in a file."""
    if numbers == FROM_0:
        return number, ""
    last = len(_ilsvrc2012_indices()) if numbers == ILSVRC2012 else number
    if not 1 <= number <= last:
        allowed = f"1..{last}" if numbers == ILSVRC2012 else "1 and more"
        return -1, f"label {number}, must be {allowed} with --label-numbers={numbers}"
    return number - 1 if numbers == FROM_1 else _ilsvrc2012_indices()[number - 1], ""


@functools.lru_cache
def _ilsvrc2012_indices() -> list[int]:
    return [int(word) for word in _ILSVRC2012_IDS.read_text().split()]


def _malformed(row: str, class_index: Mapping[str, int]) -> str:
    """Message on a line that cannot be read, with what it looks like."""
    words = [word.strip("\"'") for word in re.split(_SEPARATOR, row)]
    if row.startswith(("{", "[")):
        like = "it looks like JSON"
    elif _KAGGLE.search(row):
        like = "it looks like Kaggle's LOC_val_solution.csv: keep the image and its first class name"
    elif len(words) > 2 and any(word.lower().endswith(EXTENSIONS) for word in words[:-2]):
        like = "it has more columns: keep two"
    elif len(words) == 2 and words[0].isdecimal():
        like = "it looks like INDEX NAME: swap the columns"
    elif len(words) == 2 and class_index:
        like = f"none of the {len(class_index)} class folders is called {words[1]}"
    elif len(words) == 2 and re.fullmatch(r"[^\d.-].*", words[1]):
        like = "it looks like NAME CLASS: write the position of the class among the sorted class folders, from 0"
    else:
        like = ""
    return f"{row[:80]!r}, must be NAME INDEX, for example {_EXAMPLE}{'; ' * bool(like)}{like}"
