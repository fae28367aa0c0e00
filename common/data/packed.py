"""Packed splits: few large tar files, written by tools/pack_data.py and read by position.

A split is a folder with `packed.json` (classes, encoding, number of images), `SPLIT-000000.tar`, ..., and beside each
tar file `SPLIT-000000.json`: names, labels and places of its images. The tar files are those of webdataset: members
`KEY.jpg` and `KEY.cls`, images of all classes mixed. KEY is the position of the image in the order of the folder that
was packed, which is the order of the index.
"""

import collections
import json
import os
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from common.data.decode import BadImage
from common.errors import UserError

MANIFEST = "packed.json"
FORMAT = 1
_OPEN_FILES = 64  # of a process; opening a file takes a round trip on a network disk


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a packed split."""
    return os.path.isfile(os.path.join(folder, MANIFEST))


def read_manifest(folder: str | os.PathLike[str], flag: str) -> dict[str, Any]:
    """Content of packed.json.

    Raises:
      UserError: it cannot be read, or is of another version.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, this version reads {FORMAT}")
        if lacking := sorted({"classes", "images", "ignored", "fingerprint", "encoding", "shards"} - set(found)):
            raise ValueError(f"without {', '.join(lacking)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag}: {path} cannot be read ({error}); pack the data again") from error
    return found


class Place(typing.NamedTuple):
    """Where one image is."""

    tar_file: str
    offset: int
    size: int

    def stamp(self) -> str:
        """Text that changes when the content does.

        Raises:
          OSError: the tar file is not there.
        """
        status = os.stat(self.tar_file)
        return f"{status.st_size} {status.st_mtime_ns} {self.offset} {self.size}"

    def read(self, name: str, descriptor: int | None = None) -> bytes:
        """The content; `descriptor`: of the tar file, where it is open.

        Raises:
          BadImage: the tar file cannot be read, or is too short; `name` says of which image.
        """
        try:
            if descriptor is None:
                with open(self.tar_file, "rb") as file:
                    content = os.pread(file.fileno(), self.size, self.offset)
            else:
                content = os.pread(descriptor, self.size, self.offset)
        except OSError as error:
            raise BadImage(name, f"{self.tar_file}: {error.strerror}") from error
        if len(content) < self.size:
            raise BadImage(name, f"{self.tar_file} is cut short")
        return content


class Places:
    """Where the images of a packed split are: one row per image, in the order of its index.

    Attributes:
      shards: paths of the tar files.
      encoding: how images were encoded anew; empty where the files are unchanged.
      shard_N, offset_N, size_N: number of the tar file, position in it and length, bytes.
    """

    def __init__(
        self, shards: Sequence[str], encoding: str, shard_N: np.ndarray, offset_N: np.ndarray, size_N: np.ndarray
    ) -> None:
        self.shards, self.encoding = tuple(shards), encoding
        self.shard_N, self.offset_N, self.size_N = shard_N, offset_N, size_N
        self._files: collections.OrderedDict[int, int] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": collections.OrderedDict()}

    def select(self, rows: np.ndarray) -> "Places":
        """The rows of a mask or of indices."""
        return Places(self.shards, self.encoding, self.shard_N[rows], self.offset_N[rows], self.size_N[rows])

    def place(self, i: int) -> Place:
        """Where image i is."""
        return Place(self.shards[int(self.shard_N[i])], int(self.offset_N[i]), int(self.size_N[i]))

    def read(self, i: int, name: str) -> bytes:
        """Content of image i.

        Raises:
          BadImage: see Place.read.
        """
        place = self.place(i)
        try:
            descriptor = self._descriptor(int(self.shard_N[i]))
        except OSError as error:
            raise BadImage(name, f"{place.tar_file}: {error.strerror}") from error
        return place.read(name, descriptor)

    def _descriptor(self, shard: int) -> int:
        """File descriptor of a tar file; the most recently used ones stay open."""
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


class Listing(typing.NamedTuple):
    """A packed split in the order of its index.

    Attributes:
      classes: names of the class folders; empty for a flat folder.
      names: paths of the images relative to the folder that was packed.
      labels: int32 [N].
      ignored: number of files of that folder that were not taken for images.
      fingerprint: of the index of that folder.
    """

    classes: list[str]
    names: list[str]
    labels: np.ndarray
    ignored: int
    fingerprint: str
    places: Places


def load(folder: str, flag: str) -> Listing:
    """Read the lists beside all tar files.

    Raises:
      UserError: one is missing, or does not belong to the others.
    """
    manifest = read_manifest(folder, flag)
    total, shards = manifest["images"], manifest["shards"]
    names: list[str] = [""] * total
    labels, shard_N = np.zeros(total, np.int32), np.full(total, -1, np.int32)
    offset_N, size_N = np.zeros(total, np.int64), np.zeros(total, np.int64)
    missing = []
    for number, name in enumerate(shards):
        path = list_of(os.path.join(folder, name))
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            rows = np.array(found["positions"], np.int64)
            labels[rows], offset_N[rows], size_N[rows] = found["labels"], found["offsets"], found["sizes"]
            shard_N[rows] = number
            for row, image in zip(found["positions"], found["names"], strict=True):
                names[row] = image
            if found["fingerprint"] != manifest["fingerprint"] or found["encoding"] != manifest["encoding"]:
                raise ValueError("of another data set or encoding")
            if not os.path.isfile(os.path.join(folder, name)):
                missing.append(name)
        except FileNotFoundError:
            missing.append(name)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{flag}: {path} cannot be read ({error}); pack {name} again") from error
    if missing:
        raise UserError(
            f"{flag}: {folder} is not complete: {len(missing)} of {len(shards)} tar files are missing, first "
            f"{missing[0]}; run tools/pack_data.py again (with the other values of --shard)"
        )
    if (shard_N < 0).any():
        raise UserError(f"{flag}: {folder} lacks {int((shard_N < 0).sum())} of {total} images; pack the data again")
    places = Places([os.path.join(folder, name) for name in shards], manifest["encoding"], shard_N, offset_N, size_N)
    return Listing(manifest["classes"], names, labels, manifest["ignored"], manifest["fingerprint"], places)


def list_of(tar_file: str) -> str:
    """Path of the list beside a tar file."""
    return f"{tar_file.removesuffix('.tar')}.json"
