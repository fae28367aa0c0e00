"""Looking at every file of a dataset once: decode, hash, remember; a later run looks at changed files only.

What is known about a file stands in an SQLite file beside the cached index, so memory does not grow with the dataset,
an interrupted run loses at most a second of work, and questions about pairs of files are queries.
"""

import hashlib
import os
import pathlib
import signal
import sqlite3
import stat
import time
import typing
import warnings

import PIL
from PIL import Image

from common.data import cache, decode, file_tree
from common.errors import UserError

# What is known depends on these: another limit or another decoder looks at all files again.
_VERSION = f"1 {decode.MAX_PIXELS} {PIL.__version__}"
_BLOCK = 16_384  # files that are in memory at a time
_TASK = 32  # files that a process takes at a time
_SAVE_S = 1.0
_CONTAINERS = {"MPO": "JPEG"}  # formats that are another one with something attached


class Part(typing.NamedTuple):
    """One split of the dataset.

    Attributes:
      name: "train", "val", or "" where the dataset root itself holds the class folders.
      classes: names of the class folders; None for a flat folder of images.
      others: paths of files that are no images or lie outside class folders.
    """

    name: str
    classes: list | None
    others: list


class Record(typing.NamedTuple):
    """What is known about a file: its stamp, hash of its bytes, what is wrong (word and reason), what is odd."""

    stamp: str
    digest: bytes
    kind: str
    reason: str
    note: str


def examine(path, known=None):
    """Look at one file.

    Args:
      path: the file.
      known: stamp of an earlier look.
    Returns:
      Record, or None where the file is still the known one. Its kind is empty for an image that decodes, else
      zero-byte, giant or broken.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            return Record("", b"", "broken", "is no regular file", "")
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        if stamp == known:
            return None
        if not status.st_size:
            return Record(stamp, b"", "zero-byte", "is empty", "")
        digest = _digest(path)
    except OSError as error:
        return Record("", b"", "broken", f"cannot be read ({error.strerror})", "")
    try:
        decode.open_rgb(path)
    except decode.GiantImage as error:
        return Record(stamp, digest, "giant", error.reason, "")
    except decode.BadImage as error:
        return Record(stamp, digest, "broken", error.reason, "")
    return Record(stamp, digest, "", "", _misnamed(path))


def _digest(path):
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _misnamed(path):
    """What an image really is, where its extension says something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            found = _CONTAINERS.get(image.format, image.format)
    return "" if found == Image.registered_extensions().get(pathlib.Path(path).suffix.lower()) else f"holds a {found}"


def examine_many(task):
    """[(row number, Record or None)] of [(row number, path, known stamp)]."""
    return [(row, examine(path, known)) for row, path, known in task]


def ignore_interrupt():
    """Leave Ctrl-C to the process that collects the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Store:
    """What is known about the files of a dataset.

    Args:
      root: dataset root.
    Raises:
      UserError: another process uses it, or it cannot be written.
    """

    def __init__(self, root):
        self.root = os.path.abspath(root)
        try:
            self.path = cache.path(self.root, ".check")
            try:
                self._open()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:  # damaged: it only saves time
                self.rows.close()
                os.unlink(self.path)
                self._open()
        except sqlite3.OperationalError as error:
            raise UserError(f"DIR: another check of {self.root} is running ({self.path}: {error})") from error
        except OSError as error:
            raise UserError(f"DIR: results cannot be kept: {error}") from error
        self._saved = time.monotonic()

    def _open(self):
        self.rows = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        self.rows.execute("PRAGMA locking_mode = EXCLUSIVE")
        self.rows.execute("BEGIN EXCLUSIVE")
        self.rows.execute("CREATE TABLE IF NOT EXISTS version (text TEXT)")
        if self.rows.execute("SELECT text FROM version").fetchall() != [(_VERSION,)]:
            self.rows.execute("DELETE FROM version")
            self.rows.execute("INSERT INTO version VALUES (?)", (_VERSION,))
            self.rows.execute("DROP TABLE IF EXISTS files")
        # Paths are bytes: a file name need not be text.
        self.rows.execute(
            "CREATE TABLE IF NOT EXISTS files (path BLOB UNIQUE, part TEXT, class BLOB, listed INTEGER, stamp TEXT, "
            "digest BLOB, kind TEXT, reason TEXT, note TEXT)"
        )

    def save(self):
        """Make everything so far survive a kill."""
        self.rows.execute("COMMIT")
        self.rows.execute("BEGIN EXCLUSIVE")
        self._saved = time.monotonic()

    def close(self):
        self.rows.execute("COMMIT")
        self.rows.close()

    def list_files(self):
        """Bring the rows up to date with the files that exist; returns the Parts.

        Raises:
          UserError: the root holds neither train/ nor val/ nor class folders.
        """
        self.rows.execute("UPDATE files SET listed = 0")
        names = [name for name in ("train", "val") if os.path.isdir(os.path.join(self.root, name))]
        parts = [self._list_part(name) for name in names or [""]]
        self.rows.execute("DELETE FROM files WHERE NOT listed")
        self.save()
        return parts

    def _list_part(self, name):
        folder = os.path.join(self.root, name) if name else self.root
        prefix = f"{name}/" if name else ""
        classes, files, _ = file_tree.class_names(folder)
        if name == "val" and os.path.isfile(os.path.join(self.root, "val_label.txt")):
            images = [file for file in files if file.lower().endswith(decode.EXTENSIONS)]
            self._add(name, "", [prefix + image for image in images])
            others = sorted({*files} - {*images})
            return Part(name, None, [prefix + other for other in [*others, *(f"{folder}/" for folder in classes)]])
        if not classes:
            raise UserError(f"DIR: {folder} holds no class folders; give the folder that holds train/ and val/")
        others = list(files)
        for label, listing in zip(classes, file_tree.class_listings(folder, classes), strict=True):
            self._add(name, label, [prefix + image for image in listing.images])
            others += listing.others
        return Part(name, classes, [prefix + other for other in others])

    def _add(self, part, label, paths):
        self.rows.executemany(
            "INSERT INTO files (path, part, class, listed) VALUES (?, ?, ?, 1) ON CONFLICT (path) DO UPDATE SET "
            "part = excluded.part, class = excluded.class, listed = 1",
            [(os.fsencode(path), part, os.fsencode(label)) for path in paths],
        )

    def count(self):
        """Files of the dataset."""
        return self.rows.execute("SELECT count(*) FROM files").fetchone()[0]

    def tasks(self):
        """Yield lists of tasks for examine_many, one block of files at a time."""
        last = 0
        while block := self.rows.execute(
            "SELECT rowid, path, stamp FROM files WHERE rowid > ? ORDER BY rowid LIMIT ?", (last, _BLOCK)
        ).fetchall():
            last = block[-1][0]
            work = [(row, os.path.join(self.root, os.fsdecode(path)), known) for row, path, known in block]
            yield [work[i : i + _TASK] for i in range(0, len(work), _TASK)]

    def learn(self, results):
        """Keep what examine_many returned; returns how many of the files were new or changed."""
        new = [(*record, row) for row, record in results if record is not None]
        self.rows.executemany(
            "UPDATE files SET stamp = ?, digest = ?, kind = ?, reason = ?, note = ? WHERE rowid = ?", new
        )
        if time.monotonic() - self._saved > _SAVE_S:
            self.save()
        return len(new)
