"""Findings about a dataset, from the results of common/data/audit.py."""

import collections
import itertools
import os
import statistics
import typing
from collections.abc import Iterator, Mapping

from common.data import file_tree, labels
from common.data.audit import Split, Store


class Finding(typing.NamedTuple):
    """Something wrong, or merely odd.

    Attributes:
      kind: a word or two; findings are counted by it.
      path: file or folder, relative to the dataset root.
      reason: what is wrong.
      exclude: whether training and evaluation should leave the file out.
      is_note: odd but harmless.
    """

    kind: str
    path: str
    reason: str
    exclude: bool = False
    is_note: bool = False


def find(
    store: Store, splits: list[Split], max_imbalance: float, label_numbers: str = labels.FROM_0
) -> Iterator[Finding]:
    """Yield all findings.

    Args:
      store: results for all files.
      splits: from store.list_files.
      max_imbalance: largest allowed ratio of the sizes of the largest and the smallest class; 0: not checked.
      label_numbers: value of --label-numbers.
    """
    excluded: collections.Counter[str] = collections.Counter()  # images that decode, by folder of their class
    yield from _single_files(store)
    for copy in _copies(store):
        if copy.exclude:
            excluded["/".join(copy.path.split("/")[: 1 if splits[0].name == "" else 2])] += 1
        yield copy
    train = next((split for split in splits if split.name != "val"), None)
    val = next((split for split in splits if split.name == "val"), None)
    for split in splits:
        yield from map(_ignored, split.others)
    for split in splits:
        if split.classes is not None:
            yield from _class_sizes(store, split, max_imbalance if split is train else 0, excluded)
            if split is train and (wrong := file_tree.only_class(os.path.join(store.root, split.name), split.classes)):
                yield Finding("one class", split.name or ".", wrong)
    train_classes = train.classes if train is not None else None
    if val is not None and val.classes is None:
        yield from _label_file(store, train_classes, label_numbers)
    elif val is not None and val.classes is not None and train_classes is not None:
        yield from _class_names(train_classes, val.classes)


def _ignored(path: str) -> Finding:
    kind = file_tree.kind_ignored(path)
    if kind == "hidden":
        return Finding("ignored", path, "is hidden, or made by a system; never a class or an image", is_note=True)
    if kind:
        return Finding("unread", path, f"is a {kind} image, which is not read; convert it to JPEG or PNG")
    return Finding("ignored", path, "is not taken for an image of a class", is_note=True)


def class_sizes(store: Store, split: Split) -> dict[str, int]:
    """{class: number of images that decode}, including classes without any."""
    counted = store.db.execute(
        "SELECT class, count(*) FROM files WHERE part = ? AND kind = '' GROUP BY class", (split.name,)
    )
    return {**dict.fromkeys(split.classes or (), 0), **{os.fsdecode(name): count for name, count in counted}}


def _single_files(store: Store) -> Iterator[Finding]:
    rows = store.db.execute("SELECT path, kind, reason, note FROM files WHERE kind <> '' OR note <> '' ORDER BY path")
    for path, kind, reason, note in rows:
        yield Finding(kind or "misnamed", os.fsdecode(path), reason or note, exclude=bool(kind), is_note=not kind)
    for (path,) in store.db.execute("SELECT path FROM files WHERE turned ORDER BY path"):
        reason = "EXIF says to turn it, which is ignored; tools/split_data.py turns it"
        yield Finding("turned", os.fsdecode(path), reason, is_note=True)


def _copies(store: Store) -> Iterator[Finding]:
    """Files of equal content.

    Of equal training images all but one are to be excluded, and all where they are in different classes or in
    validation too. Validation images are only reported: accuracies are published for all of them.
    """
    rows = store.db.execute(
        "SELECT digest, path, part, class FROM files WHERE kind = '' AND digest IN (SELECT digest FROM files "
        "WHERE kind = '' GROUP BY digest HAVING count(*) > 1) ORDER BY digest, part, path"
    )
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        train: list[tuple[str, bytes]] = []
        val: list[tuple[str, bytes]] = []
        for _, path, split, label in group:
            (val if split == "val" else train).append((os.fsdecode(path), label))
        if val:
            for path, _ in train:
                yield Finding("overlap", path, f"is in validation too: {val[0][0]}", exclude=True)
        elif len({label for _, label in train}) > 1:
            for path, label in train:
                other = next(other for other, its_label in train if its_label != label)
                yield Finding("contradiction", path, f"is in another class too: {other}", exclude=True)
        else:
            for path, _ in train[1:]:
                yield Finding("duplicate", path, f"equals {train[0][0]}", exclude=True)
        for path, _ in val[1:]:
            yield Finding("duplicate", path, f"equals {val[0][0]}")


def _class_sizes(store: Store, split: Split, max_imbalance: float, excluded: Mapping[str, int]) -> Iterator[Finding]:
    sizes, prefix = class_sizes(store, split), f"{split.name}/" if split.name else ""
    for name, size in sizes.items():
        if not size:
            yield Finding("empty class", prefix + name, "holds no image that decodes")
        elif excluded.get(prefix + name) == size:
            reason = f"the list leaves out all {size} images; take lines out of it, or remove the folder"
            yield Finding("emptied class", prefix + name, reason)
    filled = sorted(((size, name) for name, size in sizes.items() if size), key=lambda item: item[0])
    if not max_imbalance or not filled:
        return
    largest = max(sizes, key=sizes.__getitem__)
    median = statistics.median(size for size, _ in filled)
    for size, name in filled:
        if size * max_imbalance < sizes[largest]:
            reason = f"{size} images; the largest class, {largest}, has {sizes[largest]}, median {median:g}"
            yield Finding("imbalance", prefix + name, reason)


def _class_names(train: list[str], val: list[str]) -> Iterator[Finding]:
    in_train, in_val = set(map(file_tree.nfc, train)), set(map(file_tree.nfc, val))
    for name in val:
        if file_tree.nfc(name) not in in_train:
            yield Finding("unknown class", f"val/{name}", "train/ has no such class")
    for name in train:
        if file_tree.nfc(name) not in in_val:
            yield Finding("untested class", f"train/{name}", "val/ has no such class", is_note=True)


def _label_file(store: Store, classes: list[str] | None, numbers: str) -> Iterator[Finding]:
    """Findings of val_label.txt; labels are not checked where `classes` is None."""
    name = "val_label.txt"
    rows = store.db.execute("SELECT path FROM files WHERE part = 'val'")
    images = sorted(os.fsdecode(path).removeprefix("val/") for (path,) in rows)
    path = os.path.join(store.root, name)
    lines = list(labels.lines(path, "DIR", classes=classes or (), numbers=numbers, images=images))
    image_of = labels.image_names([line.name for line in lines if line.name], images)
    if not lines:
        yield Finding("label", name, "no labels; expected a line NAME INDEX per image")
    for line in lines:
        where = f"line {line.number}: " if line.number else ""
        if line.error:
            yield Finding("label", name, f"{where}{line.error}")
        if line.name and image_of[line.name] is None:
            yield Finding("label", name, f"{where}val/ has no image {line.name}")
        if classes is not None and line.label >= len(classes):
            yield Finding("label", name, f"{where}label {line.label}, the classes are 0..{len(classes) - 1}")
    for image in sorted({*images} - {*image_of.values()}):
        yield Finding("unlabelled", f"val/{image}", f"is not in {name}")
