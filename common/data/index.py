"""The index of a dataset: its files, classes and labels; built once, then cached and checked without walking the tree.

Two layouts: one folder per class (`train/`, `val/`), or a flat `val/` beside `val_label.txt` (common/data/labels.py).
The paths of all images are one block of bytes, memory-mapped from the cache and shared by all processes of a node.
"""

import collections
import dataclasses
import functools
import hashlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data import cache, exclude, file_tree, labels, packed
from common.data.decode import EXTENSIONS, open_rgb, read_file
from common.errors import UserError
from common.files import StrPath

_CHUNK = 1 << 16  # paths that are turned into Python objects at a time
_RULES = 2  # raise it when other files count as classes or images: cached indexes of other rules are built again


@dataclasses.dataclass(frozen=True)
class FolderIndex:
    """Images of one split, in the order of torchvision's ImageFolder (classes, then files, both sorted).

    The loaders below reject an empty split. Compare with None instead of testing for truth.

    Attributes:
      root: folder that the paths are relative to.
      classes: sorted class names; empty for the flat layout.
      labels: int32 [N], positions in `classes`, or the numbers of val_label.txt.
      ignored: number of files and hidden folders that are not taken for images.
      ignored_kinds: number of these by file_tree.kind_ignored, where it names one.
      label_file: path of the label file of the flat layout.
      excluded: number of images that --exclude left out.
      folder_fingerprint: fingerprint before --exclude; empty where nothing was left out.
      places: of the images in tar files, where the split is packed; `path` is then a name only.
    """

    root: str
    classes: tuple[str, ...]
    labels: np.ndarray
    ignored: int
    _names: np.ndarray  # uint8, all relative paths, each followed by a zero
    _ends: np.ndarray  # int64 [N], position of the zero of each path
    ignored_kinds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    label_file: str = ""
    excluded: int = 0
    folder_fingerprint: str = ""
    places: packed.Places | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Path of image i relative to `root`."""
        start = int(self._ends[i - 1]) + 1 if i else 0
        return os.fsdecode(self._names[start : int(self._ends[i])].tobytes())

    def path(self, i: int) -> str:
        """Path of image i."""
        return os.path.join(self.root, self.name(i))

    def read(self, i: int) -> bytes | None:
        """Content of image i; None for a large file, which a decoder reads a part at a time.

        Raises:
          BadImage: it cannot be read.
        """
        return read_file(self.path(i)) if self.places is None else self.places.read(i, self.path(i))

    def image(self, i: int) -> Image.Image:
        """Image i, decoded as for the published accuracies.

        Raises:
          BadImage: it does not decode.
        """
        return open_rgb(self.path(i), self.read(i))

    def stamp(self, i: int) -> str:
        """Text that changes when the content of image i does.

        Raises:
          OSError: its file is not there.
        """
        if self.places is not None:
            return self.places.place(i).stamp()
        status = os.stat(self.path(i))
        return f"{status.st_size} {status.st_mtime_ns}"

    def names(self) -> Iterator[str]:
        """Yield all names in order, much faster than one by one."""
        for first in range(0, len(self), _CHUNK):
            last = min(first + _CHUNK, len(self)) - 1
            start = int(self._ends[first - 1]) + 1 if first else 0
            block = self._names[start : int(self._ends[last])].tobytes()
            yield from os.fsdecode(block).split("\0")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of names and labels: indexes with equal fingerprints hold the same images in the same order."""
        digest = hashlib.sha256(self._names.data)
        digest.update(self._ends.data)
        digest.update(np.ascontiguousarray(self.labels).data)
        if self.places is not None:
            digest.update(self.places.encoding.encode())  # unchanged files: the fingerprint of the folder
        return digest.hexdigest()[:16]

    @property
    def ignored_note(self) -> str:
        """How much is not taken for an image, in parentheses, or an empty text."""
        return f" ({self.ignored} other files ignored)" if self.ignored else ""

    @property
    def full_fingerprint(self) -> str:
        """The fingerprint before --exclude."""
        return self.folder_fingerprint or self.fingerprint

    def with_classes(self, classes: Sequence[str]) -> "FolderIndex":
        """The same images with labels counted in `classes`, which contains every class of this index.

        Names are compared in Unicode's composed form.
        """
        position = {file_tree.nfc(name): i for i, name in enumerate(classes)}
        table = np.array([position[file_tree.nfc(name)] for name in self.classes], np.int32)
        return dataclasses.replace(self, classes=tuple(classes), labels=table[self.labels])

    def only(self, positions: Sequence[int]) -> "FolderIndex":
        """The index of these images, in this order."""
        names = "\0".join([*(self.name(i) for i in positions), ""])
        chosen = _pack(self.root, self.classes, [names], self.labels[list(positions)], ())
        places = None if self.places is None else self.places.select(np.array(positions))
        return dataclasses.replace(chosen, label_file=self.label_file, places=places)

    def without(self, names: Set[str]) -> "FolderIndex":
        """The index without the images of these names."""
        if not names:
            return self
        if all(map(str.isascii, names)):
            keep = np.fromiter((name not in names for name in self.names()), bool, len(self))
        else:
            names = set(map(file_tree.nfc, names))
            keep = np.fromiter((file_tree.nfc(name) not in names for name in self.names()), bool, len(self))
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
            places=None if self.places is None else self.places.select(keep),
        )


def load_folder(root: StrPath, flag: str = "--data") -> FolderIndex:
    """Index of a folder of class folders, from the cache where no folder changed.

    Raises:
      UserError: no such folder, no class folders, or a class folder without images.
    """
    root = os.path.abspath(root)
    if not os.path.isdir(root):
        raise UserError(f"{flag}: {root} is not a folder")
    index = _from_cache(root)
    if index is None:
        index, folders = read_packed(root, flag) if packed.is_packed(root) else _walk(root, flag)
        header = dict(classes=index.classes, ignored=index.ignored, kinds=index.ignored_kinds, rules=_RULES)
        header |= dict(folders=folders, fingerprint=index.fingerprint)
        arrays = dict(ends=index._ends, labels=index.labels, names=index._names)
        if (places := index.places) is not None:
            header |= dict(shards=[os.path.basename(path) for path in places.shards], encoding=places.encoding)
            arrays |= dict(shard=places.shard_N, offset=places.offset_N, size=places.size_N)
        cache.write(root, header, arrays)
    return index


def _from_cache(root: str) -> FolderIndex | None:
    """The cached index, or None where there is none, it is damaged, or a folder changed."""
    stored = cache.read(root)
    if stored is None:
        return None
    header, arrays = stored
    if header.get("rules") != _RULES or not file_tree.unchanged(root, header["folders"]):
        return None
    classes, ignored, kinds = tuple(header["classes"]), header["ignored"], header["kinds"]
    index = FolderIndex(root, classes, arrays["labels"], ignored, arrays["names"], arrays["ends"], kinds)
    if "shards" in header:
        shards = [os.path.join(root, name) for name in header["shards"]]
        places = packed.Places(shards, header["encoding"], arrays["shard"], arrays["offset"], arrays["size"])
        index = dataclasses.replace(index, places=places)
    return index if index.fingerprint == header["fingerprint"] else None


def load_flat(
    folder: StrPath,
    label_file: StrPath,
    flag: str = "--data",
    classes: Sequence[str] = (),
    numbers: str = labels.FROM_0,
) -> FolderIndex:
    """Index of a flat folder of images with a label file.

    Args:
      classes: names of the classes by index, where they are known.
      numbers: value of --label-numbers.
    Raises:
      UserError: an image or a label is missing, or a mistake in the label file.
    """
    listing = packed.load(str(folder), flag) if packed.is_packed(folder) else None
    present = set(os.listdir(folder) if listing is None else listing.names)
    images = sorted(name for name in present if file_tree.is_image(name))
    found = labels.read(label_file, flag, classes=classes, numbers=numbers, images=images)
    image_of = labels.image_names(found, images)
    missing = [name for name, image in image_of.items() if image is None]
    if missing:
        raise UserError(
            f"{flag}: {len(missing)} images of {label_file} are not in {folder}, or have no name that fits one alone; "
            f"the first is {missing[0]}"
        )
    names = [image_of[name] or "" for name in found]
    if len(set(names)) < len(names):
        (twice, _), *_ = collections.Counter(names).most_common(1)
        both = " and ".join(name for name in found if image_of[name] == twice)
        raise UserError(f"{flag}: {label_file} has several labels for {twice} of {folder}: {both}; keep one")
    others = sorted(present - set(names))
    unlabeled = [name for name in others if file_tree.is_image(name)]
    if unlabeled:
        raise UserError(
            f"{flag}: {label_file} has labels for {len(found)} of the {len(images)} images in {folder}, and none for "
            f"{', '.join(unlabeled[:3])}{' ...' if len(unlabeled) > 3 else ''}; add them, or move these "
            "images elsewhere"
        )
    index = _pack(os.path.abspath(folder), (), ["\0".join([*names, ""])], list(found.values()), others)
    places = None
    if listing is not None:
        row_of = {name: row for row, name in enumerate(listing.names)}
        places = listing.places.select(np.array([row_of[name] for name in names]))
    return dataclasses.replace(index, label_file=str(label_file), places=places)


def of_files(paths: Sequence[str], targets: Sequence[int] = ()) -> FolderIndex:
    """Index of these files, in this order; without `targets` all labels are -1."""
    return _pack("", (), ["\0".join([*paths, ""])], targets or [-1] * len(paths), ())


def _walk(root: str, flag: str) -> tuple[FolderIndex, dict[str, int]]:
    """Build the index; also {folder: modification time} of every folder that was listed."""
    classes, others, modified_ns = file_tree.class_names(root)
    if not classes:
        raise UserError(f"{flag}: {root} holds no class folders; expected one folder of images per class")
    _check_distinct(root, classes, flag)
    blocks, counts, folders = [], [], {".": modified_ns}
    for name, listing in zip(classes, file_tree.class_listings(root, classes), strict=True):
        if not listing.images:
            kinds = file_tree.describe_ignored(_count_kinds(listing.others))
            raise UserError(
                f"{flag}: class folder {os.path.join(root, name)} holds no images "
                f"({', '.join(EXTENSIONS)}){' but ' + kinds if kinds else ''}; fill or remove it"
            )
        blocks.append("\0".join([*listing.images, ""]))
        counts.append(len(listing.images))
        others += listing.others
        folders.update(listing.folders)
    targets = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return _pack(root, classes, blocks, targets, others), folders


def read_packed(root: str, flag: str) -> tuple[FolderIndex, dict[str, int]]:
    """The index of a packed split; also {".": modification time} of its folder."""
    _, _, modified_ns = file_tree.class_names(root)
    classes, names, targets, ignored, fingerprint, places = packed.load(root, flag)
    if not classes:
        raise UserError(f"{flag}: {root} was packed without classes; put its val_label.txt beside it")
    index = _pack(root, classes, ["\0".join([*names, ""])], targets, ())
    if index.fingerprint != fingerprint:
        raise UserError(
            f"{flag}: {root} was changed: names or labels are not those that were packed; pack the data again"
        )
    return dataclasses.replace(index, ignored=ignored, places=places), {".": modified_ns}


def _check_distinct(root: str, classes: Sequence[str], flag: str) -> None:
    """Raise UserError for two class folders whose names look alike: they would be two classes of one name."""
    first: dict[str, str] = {}
    for name in classes:
        if first.setdefault(file_tree.nfc(name), name) != name:
            raise UserError(
                f"{flag}: {root} holds two class folders {file_tree.nfc(name)}, in Unicode's composed and decomposed "
                "form; merge them"
            )


def _count_kinds(others: Sequence[str]) -> dict[str, int]:
    kinds = collections.Counter(map(file_tree.kind_ignored, others))
    return {kind: count for kind, count in kinds.items() if kind}


def _pack(
    root: str, classes: Sequence[str], blocks: Sequence[str], targets: npt.ArrayLike, others: Sequence[str]
) -> FolderIndex:
    """An index of the names in `blocks`, each followed by a zero."""
    names = np.frombuffer(b"".join([os.fsencode(block) for block in blocks]), np.uint8)
    ends = np.flatnonzero(names == 0).astype(np.int64)
    labels = np.asarray(targets, np.int32)
    return FolderIndex(root, tuple(classes), labels, len(others), names, ends, _count_kinds(others))


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training and validation images with one class list; `val` is None where there is no validation set."""

    train: FolderIndex
    val: FolderIndex | None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def summary(self) -> str:
        """Text that ranks compare to make sure that they see the same images."""
        splits = [split for split in (self.train, self.val) if split is not None]
        return " and ".join(f"{len(split)} images ({split.fingerprint})" for split in splits)

    def without(self, paths: Set[str], is_dataset_root: bool = False) -> "Splits":
        """The splits without the images of an exclude list.

        Args:
          paths: see exclude.read.
          is_dataset_root: of the training set; see exclude.within.
        Raises:
          UserError: none of these images is in the list, or all of a split are.
        """
        train = apply_exclude_list(self.train, paths, is_dataset_root)
        val = None if self.val is None else apply_exclude_list(self.val, paths)
        if paths and not train.excluded and (val is None or not val.excluded):
            raise UserError(
                f"--exclude: none of its {len(paths)} images is here, the first is {min(paths)}; paths are relative to "
                "the dataset root; leave the list out if its images were removed"
            )
        return Splits(train, val)


def load_splits(
    root: str, flag: str = "--data", excluded: Set[str] = frozenset(), numbers: str = labels.FROM_0
) -> Splits:
    """Index `root`/train and `root`/val.

    Args:
      root: dataset root.
      flag: option that gave it.
      excluded: see exclude.read.
      numbers: value of --label-numbers.
    Raises:
      UserError: a missing or empty folder, or a class in val/ that train/ lacks.
    """
    if not root:
        raise UserError(f"{flag}: missing; give the folder that holds train/ and val/")
    if not os.path.isdir(root):
        raise UserError(f"{flag}: {root} is not a folder; expected one that holds train/ and val/")
    for part in ("train", "val"):
        if not os.path.isdir(os.path.join(root, part)):
            raise UserError(f"{flag}: {root} has no {part}/ folder; expected train/ and val/{how_to_divide(root)}")
    train = load_folder(os.path.join(root, "train"), flag)
    return Splits(train, load_val(root, train.classes, flag, numbers)).without(excluded)


def how_to_divide(root: str) -> str:
    """End of a message: the command that divides what `root` holds, class folders or a train/ without val/."""
    train = os.path.join(root, "train")
    source = train if os.path.isdir(train) else root
    if not os.path.isdir(source) or os.path.isdir(os.path.join(root, "val")) or not file_tree.class_names(source)[0]:
        return ""
    return f". To divide one folder of class folders: python tools/split_data.py {shlex.quote(source)} NEW_FOLDER"


def load_val(root: str, classes: Sequence[str], flag: str = "--data", numbers: str = labels.FROM_0) -> FolderIndex:
    """Index `root`/val, of either layout, with labels counted in `classes`.

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
        index = load_flat(folder, label_file, flag, classes, numbers)
        labels.check_range(index.labels, len(classes), label_file)
        return dataclasses.replace(index, classes=tuple(classes))
    return in_classes(load_folder(folder, flag), classes, flag)


def in_classes(
    index: FolderIndex, classes: Sequence[str], flag: str = "--data", where: str = "val/", of: str = "train/"
) -> FolderIndex:
    """A validation index with labels counted in the classes of the training set.

    Args:
      where, of: names of the validation and the training folder in the message.
    Raises:
      UserError: a class that `classes` does not have.
    """
    known = set(map(file_tree.nfc, classes))
    unknown = sorted(name for name in index.classes if file_tree.nfc(name) not in known)
    if unknown:
        alike = {file_tree.alike(name): name for name in classes}
        shown = [f"{name}{_similar(alike.get(file_tree.alike(name)), of)}" for name in unknown[:5]]
        raise UserError(
            f"{flag}: {where} has class folders that {of} lacks: {', '.join(shown)}"
            f"{' ...' if len(unknown) > 5 else ''}; move, rename or remove them"
        )
    return index.with_classes(classes)


def _similar(name: str | None, of: str) -> str:
    return f" ({of} has {name})" if name else ""


def apply_exclude_list(index: FolderIndex, paths: Set[str], is_dataset_root: bool = False) -> FolderIndex:
    """The index without the images of an exclude list (see exclude.within).

    Raises:
      UserError: the list holds all images, or all of a class.
    """
    left = index.without(exclude.within(paths, index.root, is_dataset_root))
    if not len(left):
        raise UserError(f"--exclude: it names all {len(index)} images of {index.root}")
    if left.excluded:
        before, after = np.bincount(index.labels), np.bincount(left.labels, minlength=int(index.labels.max()) + 1)
        emptied = np.flatnonzero((before > 0) & (after == 0))
        if len(emptied):
            first, more = int(emptied[0]), f" and {len(emptied) - 1} more" if len(emptied) > 1 else ""
            raise UserError(
                f"--exclude: it names all {before[first]} images of class "
                f"{index.classes[first] if index.classes else first}{more} in {index.root}; keep some of them, or "
                "remove the class folder"
            )
    return left
