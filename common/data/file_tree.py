"""List the images below a folder of class folders, many folders at a time.

Threads, not processes: on a local disk one thread, many threads and processes take about equally long, on a network
file system threads overlap the waits for the server, and a process that holds a device must not fork.
"""

import concurrent.futures
import os
import time
import typing
from collections.abc import Iterator, Mapping, Sequence

from common.data.decode import EXTENSIONS
from common.errors import UserError

_THREADS = 8
# File systems take modification times from a clock that ticks in milliseconds to seconds: a file added in the tick of
# the listing leaves the time of its folder unchanged. A folder that changed this recently is listed again next time.
_FRESH_NS = 2_000_000_000
UNTRUSTED = -1


class ClassListing(typing.NamedTuple):
    """What is below one class folder.

    Attributes:
      images: paths relative to the root, in the order of torchvision's ImageFolder: by folder, then by name.
      others: paths of the files without an extension of images.
      folders: {relative path: modification time in ns, or UNTRUSTED} of every folder that was listed.
    """

    images: list[str]
    others: list[str]
    folders: dict[str, int]


def class_names(root: str) -> tuple[list[str], list[str], int]:
    """(sorted names of the class folders of `root`, sorted names of its files, its modification time).

    Raises:
      UserError: it cannot be listed.
    """
    modified, entries = _modified_ns(os.stat(root)), _entries(root)
    folders = {entry.name for entry in entries if entry.is_dir()}
    return sorted(folders), sorted({entry.name for entry in entries} - folders), modified


def class_listings(root: str, names: Sequence[str]) -> Iterator[ClassListing]:
    """Yield the ClassListing of every class folder, in the order of `names`.

    Raises:
      UserError: a folder cannot be listed, or links to one above it.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        try:
            yield from pool.map(lambda name: _class_listing(root, name), names)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _class_listing(root: str, name: str) -> ClassListing:
    listing = ClassListing([], [], {})
    by_folder: dict[str, list[str]] = {}
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [(name, ())]
    while pending:
        relative, above = pending.pop()
        path = os.path.join(root, relative)
        status = os.stat(path)
        identity = status.st_dev, status.st_ino
        if identity in above:
            raise UserError(f"{path}: links to a folder above it; remove the link")
        listing.folders[relative] = _modified_ns(status)
        images = by_folder[relative] = []
        for entry in _entries(path):
            if entry.is_dir():
                pending.append((f"{relative}/{entry.name}", (*above, identity)))
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(entry.name)
            else:
                listing.others.append(f"{relative}/{entry.name}")
    for relative in sorted(by_folder):
        listing.images.extend([f"{relative}/{image}" for image in sorted(by_folder[relative])])
    return listing


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{path}: cannot be listed ({error.strerror})") from error


def _modified_ns(status: os.stat_result) -> int:
    """Modification time to compare later; take it before the listing, so that a change during it is noticed."""
    return status.st_mtime_ns if status.st_mtime_ns < time.time_ns() - _FRESH_NS else UNTRUSTED


def unchanged(root: str, folders: Mapping[str, int]) -> bool:
    """Whether every folder still has its modification time; adding or removing a file changes it."""
    try:
        return all(os.stat(os.path.join(root, path)).st_mtime_ns == time_ns for path, time_ns in folders.items())
    except OSError:
        return False
