"""Lists of images to leave out: what tools/check_data.py writes and --exclude reads.

One path per line, relative to the dataset root (`train/n01440764/x.JPEG`), then optionally a tab and the reason. Empty
lines and lines that begin with # mean nothing.
"""

import os
import pathlib

from common.errors import UserError


def read(path):
    """frozenset of the paths that a list holds; an empty `path` is an empty list.

    Raises:
      UserError: no such file, or a line that is no relative path.
    """
    if not path:
        return frozenset()
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"--exclude: {path} cannot be read ({error.strerror})") from error
    found = set()
    for number, line in enumerate(text.split("\n"), 1):
        name = line.partition("\t")[0].strip()
        if not name or name.startswith("#"):
            continue
        if os.path.isabs(name) or ".." in name.split("/"):
            raise UserError(f"--exclude: line {number} of {path} is {name}; paths are relative to the dataset root")
        found.add(os.path.normpath(name))
    return frozenset(found)


def within(paths, root, bare=False):
    """The part of a list that means images of the folder `root`, relative to it.

    Args:
      paths: from `read`.
      root: the folder of a split; its name is the first part of the paths that mean it (`train/...`).
      bare: whether paths may also be relative to `root` itself, because it is what the user named.
    """
    prefix = os.path.basename(root) + "/"
    inside = {path[len(prefix) :] for path in paths if path.startswith(prefix)}
    return inside | paths if bare else inside
