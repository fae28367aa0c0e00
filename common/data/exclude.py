"""Lists of images to leave out, written by tools/check_data.py and read by --exclude.

One path per line, relative to the dataset root (`train/n01440764/x.JPEG`), then optionally a tab and the reason. Empty
lines and lines that begin with # are ignored.
"""

import os
from collections.abc import Set

from common.errors import UserError
from common.files import read_text


def read(path: str) -> frozenset[str]:
    """The paths in a list; none for an empty `path`.

    Raises:
      UserError: no such file, or a line that is no relative path.
    """
    if not path:
        return frozenset()
    try:
        text = read_text(path)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--exclude: {path} cannot be read ({reason})") from error
    found = set()
    for number, line in enumerate(text.split("\n"), 1):
        name = _path_in(line)
        if not name or name.startswith("#"):
            continue
        if os.path.isabs(name) or ".." in name.split("/"):
            raise UserError(f"--exclude: line {number} of {path} is {name}; paths are relative to the dataset root")
        found.add(os.path.normpath(name))
    return frozenset(found)


def _path_in(line: str) -> str:
    return line.partition("\t")[0].strip()


def can_hold(path: str) -> bool:
    """Whether a line of a list can name a path: not with a tab, a line break, a blank at an end or # at the start."""
    return _path_in(path) == path and not path.startswith("#") and not {*path} & {"\n", "\r"}


def within(paths: Set[str], root: str, is_dataset_root: bool = False) -> Set[str]:
    """Paths relative to the folder `root` of the listed images below it.

    Args:
      paths: from `read`, relative to the dataset root.
      root: folder of a split; its name begins the paths of its images (`train/...`).
      is_dataset_root: `root` is also what the user gave as dataset root, so paths may be relative to it.
    """
    prefix = os.path.basename(root) + "/"
    inside = {path[len(prefix) :] for path in paths if path.startswith(prefix)}
    return inside | paths if is_dataset_root else inside
