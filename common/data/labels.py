"""Label files: a line `NAME INDEX` per image; indices count from 0, empty lines are ignored."""

import typing
from collections.abc import Callable, Iterator

from common.errors import UserError
from common.files import StrPath


class Line(typing.NamedTuple):
    """One line of a label file.

    Attributes:
      number: counted from 1.
      name: image name; empty in a malformed line.
      label: class index; -1 in a malformed line.
      error: what is wrong with the line, or empty.
    """

    number: int
    name: str
    label: int
    error: str


def lines(path: StrPath, flag: str, key: Callable[[str], str] = str) -> Iterator[Line]:
    """Yield the lines of a label file; bad ones have an `error`.

    Args:
      path: label file; names need not be UTF-8.
      flag: option that led to the file.
      key: image name -> what must be unique.
    Raises:
      UserError: unreadable.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            texts = file.read().split("\n")
    except OSError as error:
        raise UserError(f"{flag}: {path} cannot be read ({error.strerror})") from error
    first: dict[str, Line] = {}
    for number, text in enumerate(map(str.strip, texts), 1):
        name, _, index = text.rpartition(" ")
        name = name.strip()
        if name and index.isdecimal():
            line = Line(number, name, int(index), "")
            before = first.setdefault(key(name), line)
            if before is not line:
                again = f"{name} again with label {line.label} (line {before.number}: {before.label})"
                line = line._replace(error=f"{again}; every image counts once")
            yield line
        elif text:
            example = "'ILSVRC2012_val_00000001.JPEG 65'"
            yield Line(number, "", -1, f"{text[:80]!r}, must be NAME INDEX, for example {example}")


def read(path: StrPath, flag: str, key: Callable[[str], str] = str) -> dict[str, int]:
    """{key(image name): class index} in the order of the file.

    Args:
      path, flag, key: see `lines`.
    Raises:
      UserError: unreadable, empty, a malformed line, or an image that is named twice.
    """
    labels = {}
    for line in lines(path, flag, key):
        if line.error:
            raise UserError(f"{path}, line {line.number}: {line.error}")
        labels[key(line.name)] = line.label
    if not labels:
        raise UserError(f"{path}: no labels; expected a line NAME INDEX per image")
    return labels
