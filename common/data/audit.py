"""Check of every file of a dataset: decode, hash, record; a later run decodes changed files only.

Results are rows of an SQLite file beside the cached index: memory does not grow with the dataset, an interrupted run
loses about a second of work, and pairs of files are found by queries.
"""

import hashlib
import io
import os
import pathlib
import sqlite3
import stat
import time
import typing
import warnings
from collections.abc import Iterable, Iterator

import PIL
from PIL import Image

from common.data import cache, decode, file_tree, packed
from common.errors import UserError

# Results of another limit, another decoder or other rules of common/data/decode.py are dropped.
_VERSION = f"3 {decode.MAX_PIXELS} {PIL.__version__}"
_BLOCK = 16_384  # files in memory at a time
_TASK = 32  # files that a process takes at a time
_COMMIT_S = 1.0
_CONTAINERS = {"MPO": "JPEG"}  # formats that are another one with something attached


class Split(typing.NamedTuple):
    """One split of the dataset.

    Attributes:
      name: "train", "val", or "" where the dataset root itself holds the class folders.
      classes: names of the class folders; None for a flat folder of images.
      others: paths of files that are no images or lie outside class folders, and of folders that are not listed.
    """

    name: str
    classes: list[str] | None
    others: list[str]


class Record(typing.NamedTuple):
    """What is known about a file.

    Attributes:
      stamp: size and times, to see whether the file changed.
      digest: hash of its bytes.
      kind: empty for an image that decodes, else zero-byte, giant or broken.
      reason: why it does not decode.
      note: something odd about an image that decodes.
      turned: see decode.is_turned.
    """

    stamp: str
    digest: bytes
    kind: str
    reason: str
    note: str
    turned: bool = False


# A row number, the path of its file, the stamp of an earlier check, and where the file is in a packed split.
Task = tuple[int, str, str | None, packed.Place | None]


def examine(path: str, known_stamp: str | None = None, place: packed.Place | None = None) -> Record | None:
    """Check one file; None where it still has the stamp of an earlier check."""
    if place is not None:
        return _examine_packed(path, known_stamp, place)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            return Record("", b"", "broken", "is no regular file", "")
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        if stamp == known_stamp:
            return None
        if not status.st_size:
            return Record(stamp, b"", "zero-byte", "is empty", "")
        digest = _digest(path)
    except OSError as error:
        return Record("", b"", "broken", f"cannot be read ({error.strerror})", "")
    return _decoded(path, None, stamp, digest)


def _examine_packed(path: str, known_stamp: str | None, place: packed.Place) -> Record | None:
    try:
        stamp = place.stamp()
        if stamp == known_stamp:
            return None
        content = place.read(path)
    except OSError as error:
        return Record("", b"", "broken", f"{place.tar_file} cannot be read ({error.strerror})", "")
    except decode.BadImage as error:
        return Record("", b"", "broken", error.reason, "")
    if not content:
        return Record(stamp, b"", "zero-byte", "is empty", "")
    return _decoded(path, content, stamp, hashlib.blake2b(content, digest_size=16).digest())


def _decoded(path: str, content: bytes | None, stamp: str, digest: bytes) -> Record:
    """Record of a file that can be read; `content`: see decode.open_rgb."""
    try:
        decode.open_rgb(path, content)
    except decode.GiantImage as error:
        return Record(stamp, digest, "giant", error.reason, "")
    except decode.BadImage as error:
        return Record(stamp, digest, "broken", error.reason, "")
    return Record(stamp, digest, "", "", _format_note(path, content), decode.is_turned(path, content))


def _digest(path: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _format_note(path: str, content: bytes | None) -> str:
    """Format of an image whose extension states another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            found = _CONTAINERS.get(image.format or "", image.format)
    return "" if found == Image.registered_extensions().get(pathlib.Path(path).suffix.lower()) else f"holds a {found}"


def examine_many(tasks: Iterable[Task]) -> list[tuple[int, Record | None]]:
    """(row number, `examine` of the file) of every task."""
    return [(row, examine(path, known_stamp, place)) for row, path, known_stamp, place in tasks]


class Store:
    """Results of the check of a dataset.

    Args:
      root: dataset root.
    Raises:
      UserError: another process uses them, or they cannot be written.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self._places: dict[str, packed.Place] = {}  # of the images of packed splits
        try:
            self.path = cache.path(self.root, ".check")
            try:
                self._open()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:  # damaged: start again
                self.db.close()
                os.unlink(self.path)
                self._open()
        except sqlite3.OperationalError as error:
            raise UserError(f"DIR: another check of {self.root} is running ({self.path}: {error})") from error
        except OSError as error:
            raise UserError(f"DIR: results cannot be kept: {error}") from error
        self._committed = time.monotonic()

    def _open(self) -> None:
        self.db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        self.db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self.db.execute("BEGIN EXCLUSIVE")
        self.db.execute("CREATE TABLE IF NOT EXISTS version (text TEXT)")
        if self.db.execute("SELECT text FROM version").fetchall() != [(_VERSION,)]:
            self.db.execute("DELETE FROM version")
            self.db.execute("INSERT INTO version VALUES (?)", (_VERSION,))
            self.db.execute("DROP TABLE IF EXISTS files")
        # Paths are bytes: a file name need not be text.
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS files (path BLOB UNIQUE, part TEXT, class BLOB, listed INTEGER, stamp TEXT, "
            "digest BLOB, kind TEXT, reason TEXT, note TEXT, turned INTEGER)"
        )

    def commit(self) -> None:
        """Make the results so far survive a kill."""
        self.db.execute("COMMIT")
        self.db.execute("BEGIN EXCLUSIVE")
        self._committed = time.monotonic()

    def close(self) -> None:
        self.db.execute("COMMIT")
        self.db.close()

    def list_files(self) -> list[Split]:
        """List the files that exist now: one row each.

        Raises:
          UserError: the root holds neither train/ nor val/ nor class folders.
        """
        self.db.execute("UPDATE files SET listed = 0")
        names = [name for name in ("train", "val") if os.path.isdir(os.path.join(self.root, name))]
        splits = [self._list_split(name) for name in names or [""]]
        self.db.execute("DELETE FROM files WHERE NOT listed")
        self.commit()
        return splits

    def _list_split(self, name: str) -> Split:
        folder = os.path.join(self.root, name) if name else self.root
        prefix = f"{name}/" if name else ""
        if packed.is_packed(folder):
            return self._list_packed(name, folder, prefix)
        classes, files, _ = file_tree.class_names(folder)
        if name == "val" and os.path.isfile(os.path.join(self.root, "val_label.txt")):
            images = [file for file in files if file_tree.is_image(file)]
            self._add(name, "", [prefix + image for image in images])
            others = sorted({*files} - {*images})
            return Split(name, None, [prefix + other for other in [*others, *(f"{folder}/" for folder in classes)]])
        if not classes:
            raise UserError(f"DIR: {folder} holds no class folders; give the folder that holds train/ and val/")
        others = list(files)
        for label, listing in zip(classes, file_tree.class_listings(folder, classes), strict=True):
            self._add(name, label, [prefix + image for image in listing.images])
            others += listing.others
        return Split(name, classes, [prefix + other for other in others])

    def _list_packed(self, name: str, folder: str, prefix: str) -> Split:
        listing = packed.load(folder, "DIR")
        images = [prefix + image for image in listing.names]
        self._places |= {image: listing.places.place(i) for i, image in enumerate(images)}
        by_class: dict[str, list[str]] = {label: [] for label in listing.classes or [""]}
        for image, label in zip(images, listing.labels.tolist(), strict=True):
            by_class[listing.classes[label] if listing.classes else ""].append(image)
        for label, paths in by_class.items():
            self._add(name, label, paths)
        return Split(name, listing.classes or None, [])

    def _add(self, split: str, label: str, paths: list[str]) -> None:
        self.db.executemany(
            "INSERT INTO files (path, part, class, listed) VALUES (?, ?, ?, 1) ON CONFLICT (path) DO UPDATE SET "
            "part = excluded.part, class = excluded.class, listed = 1",
            [(os.fsencode(path), split, os.fsencode(label)) for path in paths],
        )

    def num_files(self) -> int:
        return self.db.execute("SELECT count(*) FROM files").fetchone()[0]

    def tasks(self) -> Iterator[list[list[Task]]]:
        """Yield arguments of examine_many, one block of files at a time."""
        last = 0
        while block := self.db.execute(
            "SELECT rowid, path, stamp FROM files WHERE rowid > ? ORDER BY rowid LIMIT ?", (last, _BLOCK)
        ).fetchall():
            last = block[-1][0]
            work = [
                (row, os.path.join(self.root, name), stamp, self._places.get(name))
                for row, name, stamp in ((row, os.fsdecode(path), stamp) for row, path, stamp in block)
            ]
            yield [work[i : i + _TASK] for i in range(0, len(work), _TASK)]

    def update(self, results: list[tuple[int, Record | None]]) -> int:
        """Keep the results of examine_many; returns how many of the files were new or changed."""
        new = [(*record, row) for row, record in results if record is not None]
        self.db.executemany(
            "UPDATE files SET stamp = ?, digest = ?, kind = ?, reason = ?, note = ?, turned = ? WHERE rowid = ?", new
        )
        if time.monotonic() - self._committed > _COMMIT_S:
            self.commit()
        return len(new)
