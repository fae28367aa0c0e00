"""Listing the images below a folder of class folders, many folders at a time.

Threads, not processes: on a local disk one thread, many threads and processes take about equally long (the work is
copying names), on a network file system threads wait for the server together, and a process that already holds a
device must not fork.
"""

import concurrent.futures
import os
import time
import typing

from common.data.decode import EXTENSIONS
from common.errors import UserError

_THREADS = 8
# File systems stamp folders with a clock that ticks in milliseconds to seconds: a file that is added in the tick of the
# listing changes nothing that could be seen later. So the stamp of a folder that changed this recently is not trusted.
_FRESH_NS = 2_000_000_000
UNTRUSTED = -1


class ClassListing(typing.NamedTuple):
    """What is below one class folder.

    Attributes:
      images: paths relative to the root, in torchvision's order: sorted by folder, then by name.
      others: paths of the files whose extension is no image's.
      folders: {relative path: modification time in ns, or UNTRUSTED} of every folder that was listed.
    """

    images: list
    others: list
    folders: dict


def class_names(root):
    """(sorted names of the class folders of `root`, sorted names of its files, its own stamp).

    Raises:
      UserError: it cannot be listed.
    """
    stamp, entries = _stamp(os.stat(root)), _entries(root)
    folders, files = [], []
    for entry in entries:
        (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files), stamp


def class_listings(root, names):
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


def _class_listing(root, name):
    listing, by_folder = ClassListing([], [], {}), {}
    pending = [(name, ())]
    while pending:
        relative, above = pending.pop()
        path = os.path.join(root, relative)
        status = os.stat(path)
        identity = status.st_dev, status.st_ino
        if identity in above:
            raise UserError(f"{path}: links to a folder above it; remove the link")
        listing.folders[relative] = _stamp(status)
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


def _entries(path):
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{path}: cannot be listed ({error.strerror})") from error


def _stamp(status):
    """Modification time that is compared later; taken before the listing, so that a change during it is noticed."""
    return status.st_mtime_ns if status.st_mtime_ns < time.time_ns() - _FRESH_NS else UNTRUSTED


def unchanged(root, folders):
    """Whether every folder of {relative path: stamp} still has its stamp; adding or removing a file changes it."""
    try:
        return all(os.stat(os.path.join(root, path)).st_mtime_ns == stamp for path, stamp in folders.items())
    except OSError:
        return False
