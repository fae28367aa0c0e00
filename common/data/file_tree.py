"""List the images below a folder of class folders, many folders at a time.

Threads, not processes: on a local disk one thread, many threads and processes take about equally long, on a network
file system threads overlap the waits for the server, and a process that holds a device must not fork.
"""

import concurrent.futures
import os
import time
import typing
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from common.data.decode import EXTENSIONS, UNREAD_EXTENSIONS
from common.errors import UserError

_THREADS = 8
# File systems take modification times from a clock that ticks in milliseconds to seconds: a file added in the tick of
# the listing leaves the time of its folder unchanged. A folder that changed this recently is listed again next time.
_FRESH_NS = 2_000_000_000
UNTRUSTED = -1
# Names, in lower case, of what archivers, file managers, storage systems and Python leave in folders.
_SYSTEM_NAMES = {
    *("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is neither class nor image: a leading dot, or a name of _SYSTEM_NAMES."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def kind_ignored(path: str) -> str:
    """Kind of a file or folder that is not taken for an image: "hidden", the extension of an image, or empty."""
    name = os.path.basename(path.rstrip("/"))
    if is_hidden(name):
        return "hidden"
    extension = os.path.splitext(name)[1].lower()
    return extension if extension in UNREAD_EXTENSIONS else ""


def describe_ignored(kinds: Mapping[str, int]) -> str:
    """The kinds of `kind_ignored` with their numbers, or an empty text where nothing is to be said about them."""
    unread = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind.startswith("."))
    texts = [f"{unread}, which are not read; convert them to JPEG or PNG"] if unread else []
    return ", ".join(([f"{kinds['hidden']} hidden"] if kinds.get("hidden") else []) + texts)


def nfc(name: str) -> str:
    """A name in Unicode's composed form: macOS stores decomposed names, most other systems what was typed."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def alike(name: str) -> str:
    """What names have in common that differ in case, separators or Unicode form."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", name).casefold()))


class ClassListing(typing.NamedTuple):
    """What is below one class folder.

    Attributes:
      images: paths relative to the root, in the order of torchvision's ImageFolder: by folder, then by name.
      others: paths of what is not taken for an image; a hidden folder, which is not listed, ends with a slash.
      folders: {relative path: modification time in ns, or UNTRUSTED} of every folder that was listed.
    """

    images: list[str]
    others: list[str]
    folders: dict[str, int]


def only_class(root: str, classes: Sequence[str]) -> str:
    """What is wrong with class folders that are a single one, or nothing.

    Args:
      root: folder that holds it, on disk or not.
    """
    if len(classes) != 1:
        return ""
    folder, text = os.path.join(root, classes[0]), f"holds one class folder, {classes[0]}; a classifier needs two"
    if not os.path.isdir(folder) or len(class_names(folder)[0]) < 2:
        return text
    return f"{text}. {folder} holds folders too; where those are the classes, they belong one level up"


def class_names(root: str) -> tuple[list[str], list[str], int]:
    """(sorted names of the class folders of `root`, sorted names of all else in it, its modification time).

    Raises:
      UserError: it cannot be listed.
    """
    modified, entries = _modified_ns(os.stat(root)), _entries(root)
    folders = {entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)}
    others = sorted(
        f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries if entry.name not in folders
    )
    return sorted(folders), others, modified


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
                if is_hidden(entry.name):
                    listing.others.append(f"{relative}/{entry.name}/")
                else:
                    pending.append((f"{relative}/{entry.name}", (*above, identity)))
            elif is_image(entry.name):
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
