"""File names in the chain image -> input file -> result: what ais_bench and atc accept and make of them."""

import pathlib
import re
from collections.abc import Iterable

from common.errors import UserError

SETTINGS = "preprocess.json"  # in a folder of input files, of which ais_bench reads only .bin and .npy
# Characters of paths: ais_bench since 2024; atc accepts letters of any script.
ACCEPTED = {
    "ais_bench": (re.compile(r"[A-Za-z0-9_./-]*"), "A-Z a-z 0-9 _ - ."),
    "atc": (re.compile(r"[\w./-]*"), "letters, digits and _ - ."),
}


def stem(name: str) -> str:
    """A file name up to its first dot, where ais_bench cuts it: the result of STEM.bin is STEM_0.txt."""
    return name.partition(".")[0]


def check_stems(flag: str, paths: Iterable[pathlib.Path]) -> None:
    """Raise UserError for the first two files whose results would have the same name."""
    first: dict[str, pathlib.Path] = {}
    for path in paths:
        other = first.setdefault(stem(path.name), path)
        if other is not path:
            raise UserError(
                f"{flag}: the results of {other.name} and {path.name} would both be called {stem(path.name)}_0, names "
                "are cut at the first dot; rename one"
            )


def is_accepted(path: str | pathlib.Path, tool: str) -> bool:
    """Whether a tool of ACCEPTED takes the characters of a path."""
    return ACCEPTED[tool][0].fullmatch(str(path)) is not None


def check_characters(flag: str, path: pathlib.Path, tool: str) -> None:
    """Raise UserError unless a tool of ACCEPTED takes the characters of a path."""
    if not is_accepted(path, tool):
        raise UserError(f"{flag}: {path} has characters other than {ACCEPTED[tool][1]}, which {tool} refuses")
