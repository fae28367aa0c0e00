"""The index of a dataset: which files, which classes; built once, cached, and checked without walking the tree again.

Two layouts: one folder per class (`train/`, `val/`), or a flat `val/` beside `val_label.txt` (`NAME INDEX` per line).
The paths of all images are one block of bytes with offsets, so a million files cost about 60 MB in every process and
load in milliseconds.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
import zipfile

import numpy as np

from common.data.decode import EXTENSIONS
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class FolderIndex:
    """Images of one split, in torchvision's ImageFolder order (classes, then files, both sorted).

    Attributes:
      root: folder that the paths are relative to.
      classes: sorted class names; empty for the flat layout.
      labels: int32 [N], positions in `classes`, or the numbers of val_label.txt.
      ignored: count of files whose extension is not an image's.
    """

    root: str
    classes: tuple[str, ...]
    labels: np.ndarray
    ignored: int
    _names: np.ndarray  # uint8, all relative paths behind each other
    _ends: np.ndarray  # int64 [N], end of each path in _names

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """Path of image i relative to `root`."""
        start = int(self._ends[i - 1]) if i else 0
        return os.fsdecode(self._names[start : int(self._ends[i])].tobytes())

    def path(self, i):
        """Path of image i."""
        return os.path.join(self.root, self.name(i))

    @property
    def fingerprint(self):
        """Hash of names and labels: two indexes with equal fingerprints give the same images in the same order."""
        digest = hashlib.sha256(self._names.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def relabelled(self, classes):
        """The same images with labels counted in another class list, which must contain every class of this one."""
        position = {name: i for i, name in enumerate(classes)}
        table = np.array([position[name] for name in self.classes], np.int32)
        return dataclasses.replace(self, classes=tuple(classes), labels=table[self.labels])


def load_folder(root, flag="--data"):
    """Index of a folder of class folders, from the cache where that is still true.

    Raises:
      UserError: no such folder, no class folders, or a class folder without images.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        raise UserError(f"{flag}: {root} is not a folder")
    cache = _cache_file(root)
    index = _read_cache(cache, root)
    if index is None:
        index, folders = _walk(root, flag)
        _write_cache(cache, index, folders)
    return index


def load_flat(folder, label_file, flag="--data"):
    """Index of a flat folder of images with a label file of lines `NAME INDEX`; indices count from 0."""
    names, labels = [], []
    for number, line in enumerate(pathlib.Path(label_file).read_text().splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdigit():
            raise UserError(f"{label_file}: line {number} is {line!r}, must be `NAME INDEX`")
        names.append(name.strip())
        labels.append(int(label))
    present = set(os.listdir(folder))
    missing = [name for name in names if name not in present]
    if missing:
        raise UserError(f"{flag}: {len(missing)} images of {label_file} are not in {folder}, the first is {missing[0]}")
    return _pack(folder, (), names, labels, len(present) - len(set(names)))


def _walk(root, flag):
    """Build the index; also returns {folder: mtime_ns} of every folder that was listed, for the cache."""
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise UserError(f"{flag}: {root} holds no class folders; expected one folder of images per class")
    names, labels, ignored, folders = [], [], 0, {".": os.stat(root).st_mtime_ns}
    for label, name in enumerate(classes):
        before = len(names)
        for folder, subfolders, files in os.walk(os.path.join(root, name), followlinks=True):
            subfolders.sort()
            relative = os.path.relpath(folder, root)
            folders[relative] = os.stat(folder).st_mtime_ns
            images = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
            ignored += len(files) - len(images)
            names += [os.path.join(relative, file) for file in images]
        if len(names) == before:
            raise UserError(
                f"{flag}: class folder {os.path.join(root, name)} holds no images "
                f"({', '.join(EXTENSIONS)}); fill or remove it"
            )
        labels += [label] * (len(names) - before)
    return _pack(root, classes, names, labels, ignored), folders


def _pack(root, classes, names, labels, ignored):
    encoded = [os.fsencode(name) for name in names]
    return FolderIndex(
        str(root),
        tuple(classes),
        np.array(labels, np.int32),
        ignored,
        np.frombuffer(b"".join(encoded), np.uint8),
        np.cumsum([len(name) for name in encoded], dtype=np.int64),
    )


def _cache_file(root):
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "image-zoo", hashlib.sha256(os.fsencode(root)).hexdigest()[:24] + ".npz")


def _read_cache(cache, root):
    """The cached index, or None where there is none or a folder changed since (adding or removing a file changes the
    modification time of its folder)."""
    try:
        with np.load(cache, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            for folder, mtime_ns in header["folders"].items():
                if os.stat(os.path.join(root, folder)).st_mtime_ns != mtime_ns:
                    return None
            return FolderIndex(
                root, tuple(header["classes"]), stored["labels"], header["ignored"], stored["names"], stored["ends"]
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent, torn or outdated
        return None


def _write_cache(cache, index, folders):
    """Store the index; a cache that cannot be written (read-only home, full disk) only costs the next start a walk."""
    header = json.dumps(dict(classes=index.classes, ignored=index.ignored, folders=folders)).encode()
    try:
        os.makedirs(os.path.dirname(cache), exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(cache), suffix=".tmp", delete=False) as file:
            np.savez(
                file, header=np.frombuffer(header, np.uint8), labels=index.labels, names=index._names, ends=index._ends
            )
        os.replace(file.name, cache)
    except OSError:
        pass


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training and validation images with one class list; `val` is None where there is no validation set."""

    train: FolderIndex
    val: FolderIndex | None

    @property
    def classes(self):
        return self.train.classes


def load_splits(root, flag="--data"):
    """Index `root`/train and `root`/val.

    Raises:
      UserError: a missing or empty folder, or a class in val/ that train/ lacks.
    """
    if not root:
        raise UserError(f"{flag}: missing; give the folder that holds train/ and val/")
    if not os.path.isdir(root):
        raise UserError(f"{flag}: {root} is not a folder; expected one that holds train/ and val/")
    for part in ("train", "val"):
        if not os.path.isdir(os.path.join(root, part)):
            raise UserError(f"{flag}: {root} has no {part}/ folder; expected train/ and val/")
    train = load_folder(os.path.join(root, "train"), flag)
    return Splits(train, load_val(root, train.classes, flag))


def load_val(root, classes, flag="--data"):
    """Index `root`/val (either layout) with labels counted in `classes`.

    Raises:
      UserError: a missing folder, or a class or label that `classes` does not have.
    """
    folder, label_file = os.path.join(root, "val"), os.path.join(root, "val_label.txt")
    if not os.path.isdir(folder):
        raise UserError(
            f"{flag}: {root} has no val/ folder; expected val/ with one folder per class, "
            "or val/ with images beside val_label.txt"
        )
    if os.path.isfile(label_file):
        index = load_flat(folder, label_file, flag)
        if len(index) and index.labels.max() >= len(classes):
            raise UserError(f"{label_file}: label {index.labels.max()}, the classes are 0..{len(classes) - 1}")
        return dataclasses.replace(index, classes=tuple(classes))
    return in_classes(load_folder(folder, flag), classes, flag)


def in_classes(index, classes, flag="--data", where="val/", of="train/"):
    """A validation index with labels counted in the classes of the training set; `where` and `of` name both to people.

    Raises:
      UserError: a class that `classes` does not have.
    """
    unknown = sorted(set(index.classes) - set(classes))
    if unknown:
        raise UserError(
            f"{flag}: {where} has class folders that {of} lacks: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}; move or remove them"
        )
    return index.relabelled(classes)
