"""The index of a dataset: which files, which classes; built once, cached, and checked without walking the tree again.

Two layouts: one folder per class (`train/`, `val/`), or a flat `val/` beside `val_label.txt` (`NAME INDEX` per line).
The paths of all images are one block of bytes, which all processes of a machine map from the cache and share.
"""

import dataclasses
import functools
import hashlib
import os

import numpy as np

from common.data import cache, exclude, file_tree, labels
from common.data.decode import EXTENSIONS
from common.errors import UserError

_CHUNK = 1 << 16  # paths that are turned into Python objects at a time


@dataclasses.dataclass(frozen=True)
class FolderIndex:
    """Images of one split, in torchvision's ImageFolder order (classes, then files, both sorted).

    Attributes:
      root: folder that the paths are relative to.
      classes: sorted class names; empty for the flat layout.
      labels: int32 [N], positions in `classes`, or the numbers of val_label.txt.
      ignored: count of files whose extension is not an image's.
      excluded: count of images of the folder that --exclude left out.
      folder_fingerprint: of the index before that; empty where nothing was left out.
    """

    root: str
    classes: tuple[str, ...]
    labels: np.ndarray
    ignored: int
    _names: np.ndarray  # uint8, all relative paths, each with a zero behind it
    _ends: np.ndarray  # int64 [N], position of the zero of each path
    excluded: int = 0
    folder_fingerprint: str = ""

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """Path of image i relative to `root`."""
        start = int(self._ends[i - 1]) + 1 if i else 0
        return os.fsdecode(self._names[start : int(self._ends[i])].tobytes())

    def path(self, i):
        """Path of image i."""
        return os.path.join(self.root, self.name(i))

    def names(self):
        """Yield all names in order, much faster than one by one."""
        for first in range(0, len(self), _CHUNK):
            last = min(first + _CHUNK, len(self)) - 1
            start = int(self._ends[first - 1]) + 1 if first else 0
            block = self._names[start : int(self._ends[last])].tobytes()
            yield from os.fsdecode(block).split("\0")

    @functools.cached_property
    def fingerprint(self):
        """Hash of names and labels: two indexes with equal fingerprints give the same images in the same order."""
        digest = hashlib.sha256(self._names)
        digest.update(self._ends)
        digest.update(np.ascontiguousarray(self.labels))
        return digest.hexdigest()[:16]

    @property
    def whole_fingerprint(self):
        """The fingerprint that the folder had before anything was left out."""
        return self.folder_fingerprint or self.fingerprint

    def relabelled(self, classes):
        """The same images with labels counted in another class list, which must contain every class of this one."""
        position = {name: i for i, name in enumerate(classes)}
        table = np.array([position[name] for name in self.classes], np.int32)
        return dataclasses.replace(self, classes=tuple(classes), labels=table[self.labels])

    def without(self, names):
        """The index less the images whose names are in a set; classes stay, even those that lose all images."""
        if not names:
            return self
        keep = np.fromiter((name not in names for name in self.names()), bool, len(self))
        if keep.all():
            return self
        lengths = np.diff(self._ends, prepend=-1)
        return dataclasses.replace(
            self,
            labels=self.labels[keep],
            excluded=int(len(self) - keep.sum()),
            folder_fingerprint=self.fingerprint,
            _names=self._names[np.repeat(keep, lengths)],
            _ends=np.cumsum(lengths[keep]) - 1,
        )


def load_folder(root, flag="--data"):
    """Index of a folder of class folders, from the cache where that is still true.

    Raises:
      UserError: no such folder, no class folders, or a class folder without images.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        raise UserError(f"{flag}: {root} is not a folder")
    index = _from_cache(root)
    if index is None:
        index, folders = _walk(root, flag)
        header = dict(classes=index.classes, ignored=index.ignored, folders=folders, fingerprint=index.fingerprint)
        cache.write(root, header, dict(ends=index._ends, labels=index.labels, names=index._names))
    return index


def _from_cache(root):
    """The cached index, or None where there is none, it is damaged, or a folder changed since."""
    stored = cache.read(root)
    if stored is None:
        return None
    header, arrays = stored
    if not file_tree.unchanged(root, header["folders"]):
        return None
    index = FolderIndex(
        root, tuple(header["classes"]), arrays["labels"], header["ignored"], arrays["names"], arrays["ends"]
    )
    return index if index.fingerprint == header["fingerprint"] else None


def load_flat(folder, label_file, flag="--data"):
    """Index of a flat folder of images with a label file (see common/data/labels.py).

    Raises:
      UserError: a file that is not there, or a mistake in the label file.
    """
    found = labels.read(label_file, flag)
    present = set(os.listdir(folder))
    missing = [name for name in found if name not in present]
    if missing:
        raise UserError(f"{flag}: {len(missing)} images of {label_file} are not in {folder}, the first is {missing[0]}")
    names = "\0".join([*found, ""])
    return _pack(os.path.abspath(folder), (), [names], list(found.values()), len(present) - len(found))


def _walk(root, flag):
    """Build the index; also returns {folder: stamp} of every folder that was listed, for the cache."""
    classes, files, stamp = file_tree.class_names(root)
    if not classes:
        raise UserError(f"{flag}: {root} holds no class folders; expected one folder of images per class")
    blocks, counts, ignored, folders = [], [], 0, {".": stamp}
    for name, listing in zip(classes, file_tree.class_listings(root, classes), strict=True):
        if not listing.images:
            raise UserError(
                f"{flag}: class folder {os.path.join(root, name)} holds no images "
                f"({', '.join(EXTENSIONS)}); fill or remove it"
            )
        blocks.append("\0".join([*listing.images, ""]))
        counts.append(len(listing.images))
        ignored += len(listing.others)
        folders.update(listing.folders)
    targets = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return _pack(root, classes, blocks, targets, ignored), folders


def _pack(root, classes, blocks, targets, ignored):
    """An index of names that stand in `blocks`, each with a zero behind it."""
    names = np.frombuffer(b"".join([os.fsencode(block) for block in blocks]), np.uint8)
    ends = np.flatnonzero(names == 0).astype(np.int64)
    return FolderIndex(str(root), tuple(classes), np.asarray(targets, np.int32), ignored, names, ends)


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training and validation images with one class list; `val` is None where there is no validation set."""

    train: FolderIndex
    val: FolderIndex | None

    @property
    def classes(self):
        return self.train.classes

    @property
    def summary(self):
        """What ranks compare to know that they see the same images, in words."""
        parts = [f"{len(split)} images ({split.fingerprint})" for split in (self.train, self.val) if split is not None]
        return " and ".join(parts)

    def without(self, paths, bare=False):
        """The splits less the images of a list; its paths may also be relative to train's folder where `bare`.

        Raises:
          UserError: the list means none of these images, or all of a split.
        """
        train = leave_out(self.train, paths, bare)
        val = None if self.val is None else leave_out(self.val, paths)
        if paths and not train.excluded and (val is None or not val.excluded):
            raise UserError(
                f"--exclude: none of its {len(paths)} images is here, the first is {min(paths)}; paths are relative to "
                "the dataset root; leave the list out if its images were removed"
            )
        return Splits(train, val)


def load_splits(root, flag="--data", excluded=frozenset()):
    """Index `root`/train and `root`/val.

    Args:
      root: dataset root.
      flag: how the user named it.
      excluded: paths to leave out, from exclude.read.
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
    return Splits(train, load_val(root, train.classes, flag)).without(excluded)


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
        if index.labels.max() >= len(classes):
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


def leave_out(index, paths, bare=False):
    """The index less the images of a list (see exclude.within).

    Raises:
      UserError: nothing is left.
    """
    left = index.without(exclude.within(paths, index.root, bare))
    if not len(left):
        raise UserError(f"--exclude: it names all {len(index)} images of {index.root}")
    return left
