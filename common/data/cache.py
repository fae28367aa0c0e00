"""Memory-mapped cache of arrays that are expensive to compute.

A file is a line of JSON, padded to 64 bytes, then the bytes of the arrays. All ranks and dataloader workers of a node
share the pages of the mapped file.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from common.files import write_atomic

_ALIGNMENT = 64
_VERSION = 2

Arrays = dict[str, np.ndarray]


def read(key: str, kind: str = "") -> tuple[dict[str, Any], Arrays] | None:
    """(header, read-only arrays) that were stored under a key; None where there are none or the file is torn.

    Args:
      kind: suffix of the file's name, see `keep_newest`.
    """
    for folder in _folders():
        try:
            return _map(os.path.join(folder, _file_name(key) + kind))
        except (OSError, ValueError, KeyError, TypeError):  # absent, torn, or of another version
            continue
    return None


def write(key: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], kind: str = "") -> None:
    """Store a header that JSON can express, and arrays; does nothing where no folder can be written."""
    layout = [(name, array.dtype.str, len(array)) for name, array in arrays.items()]
    line = json.dumps(dict(version=_VERSION, header=header, arrays=layout)).encode()
    line += b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"
    content = [np.ascontiguousarray(array).data for array in arrays.values()]
    for folder in _folders():
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            target = os.path.join(folder, _file_name(key) + kind)
            write_atomic(target, line, *content, mode=0o600)
            return
        except OSError:
            continue


def keep_newest(kind: str, number: int) -> None:
    """Remove the oldest files of a kind until `number` are left; a process that has mapped one keeps its pages."""
    for folder in _folders():
        files = []
        with contextlib.suppress(OSError):
            files = [entry for entry in os.scandir(folder) if entry.name.endswith(kind)]
        for entry in sorted(files, key=_age)[number:]:
            with contextlib.suppress(OSError):
                os.remove(entry.path)


def _age(entry: "os.DirEntry[str]") -> int:
    """Nanoseconds, negative since 1970; the largest for a file that another process has removed."""
    try:
        return -entry.stat().st_mtime_ns
    except OSError:
        return 0


def path(key: str, suffix: str) -> str:
    """Path for other data about a key, in a folder that exists and can be written.

    Raises:
      OSError: there is no such folder.
    """
    for folder in _folders():
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return os.path.join(folder, _file_name(key) + suffix)
    raise OSError("neither the home folder's .cache nor the temporary folder can be written")


def _folders() -> Iterator[str]:
    """The user's cache folder, then, where that is read-only, one of the user's own among the temporary files."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    yield os.path.join(base, "image-zoo")
    if hasattr(os, "getuid"):
        own = os.path.join(tempfile.gettempdir(), f"image-zoo-{os.getuid()}")
        try:
            status = os.lstat(own)
        except OSError:
            yield own
            return
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():  # not one that another user made
            yield own


def _file_name(key: str) -> str:
    return hashlib.sha256(os.fsencode(key)).hexdigest()[:24]


def _map(path: str) -> tuple[dict[str, Any], Arrays]:
    with open(path, "rb") as file:
        line = file.readline()
        stored = json.loads(line)
        if stored["version"] != _VERSION:
            raise ValueError(stored["version"])
    # asarray: slices of the subclass memmap are several times slower
    block, start, arrays = np.asarray(np.memmap(path, np.uint8, "r")), len(line), {}
    for name, dtype, count in stored["arrays"]:
        end = start + count * np.dtype(dtype).itemsize
        if end > len(block):
            raise ValueError(f"{path} is torn")
        arrays[name] = block[start:end].view(dtype)
        start = end
    return stored["header"], arrays
