"""What is wrong with a dataset, from what common/data/check.py knows about its files."""

import itertools
import os
import statistics
import typing

from common.data import labels


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


def find(store, parts, max_imbalance):
    """Yield all Findings.

    Args:
      store: check.Store whose files were all examined.
      parts: its check.Parts.
      max_imbalance: how many times as many images as the smallest the largest class may have.
    """
    yield from _single_files(store)
    yield from _copies(store)
    train = next((part for part in parts if part.name != "val"), None)
    val = next((part for part in parts if part.name == "val"), None)
    for part in parts:
        yield from _others(part)
    for part in parts:
        if part.classes is not None:
            yield from _class_sizes(store, part, max_imbalance if part is train else None)
    if val and val.classes is None:
        yield from _label_file(store, len(train.classes) if train else None)
    elif train and val:
        yield from _class_names(train.classes, val.classes)


def class_sizes(store, part):
    """{class: images that decode}, classes without any included."""
    counted = store.rows.execute(
        "SELECT class, count(*) FROM files WHERE part = ? AND kind = '' GROUP BY class", (part.name,)
    )
    return {**dict.fromkeys(part.classes or (), 0), **{os.fsdecode(name): count for name, count in counted}}


def _single_files(store):
    rows = store.rows.execute("SELECT path, kind, reason, note FROM files WHERE kind <> '' OR note <> '' ORDER BY path")
    for path, kind, reason, note in rows:
        yield Finding(kind or "misnamed", os.fsdecode(path), reason or note, exclude=bool(kind), is_note=not kind)


def _copies(store):
    """Files of equal content. Of those in training all but one are to be left out, all where they contradict each other
    or are in validation too. Validation stays as published, where its images are counted: copies there are only named.
    """
    rows = store.rows.execute(
        "SELECT digest, path, part, class FROM files WHERE kind = '' AND digest IN (SELECT digest FROM files "
        "WHERE kind = '' GROUP BY digest HAVING count(*) > 1) ORDER BY digest, part, path"
    )
    for _, group in itertools.groupby(rows, key=lambda row: row[0]):
        train, val = [], []
        for _, path, part, label in group:
            (val if part == "val" else train).append((os.fsdecode(path), label))
        if val:
            for path, _ in train:
                yield Finding("overlap", path, f"is in validation too: {val[0][0]}", exclude=True)
        elif len({label for _, label in train}) > 1:
            for path, label in train:
                other = next(name for name, its in train if its != label)
                yield Finding("contradiction", path, f"is in another class too: {other}", exclude=True)
        else:
            for path, _ in train[1:]:
                yield Finding("duplicate", path, f"equals {train[0][0]}", exclude=True)
        for path, _ in val[1:]:
            yield Finding("duplicate", path, f"equals {val[0][0]}")


def _others(part):
    for path in part.others:
        yield Finding("ignored", path, "is not taken for an image of a class", is_note=True)


def _class_sizes(store, part, max_imbalance):
    sizes, prefix = class_sizes(store, part), f"{part.name}/" if part.name else ""
    for name, size in sizes.items():
        if not size:
            yield Finding("empty class", prefix + name, "holds no image that decodes")
    filled = {name: size for name, size in sizes.items() if size}
    if max_imbalance and filled and max(filled.values()) > max_imbalance * min(filled.values()):
        largest, median = max(filled, key=filled.get), statistics.median(filled.values())
        for name in sorted(filled, key=filled.get):
            if filled[name] * max_imbalance >= filled[largest]:
                break
            yield Finding(
                "imbalance",
                prefix + name,
                f"{filled[name]} images; the largest class, {largest}, has {filled[largest]}, median {median:g}",
            )


def _class_names(train, val):
    for name in sorted({*val} - {*train}):
        yield Finding("unknown class", f"val/{name}", "train/ has no such class")
    for name in sorted({*train} - {*val}):
        yield Finding("untested class", f"train/{name}", "val/ has no such class", is_note=True)


def _label_file(store, num_classes):
    """Findings of val_label.txt."""
    name, lines = "val_label.txt", list(labels.lines(os.path.join(store.root, "val_label.txt"), "DIR"))
    images = {
        os.fsdecode(path)[len("val/") :] for (path,) in store.rows.execute("SELECT path FROM files WHERE part = 'val'")
    }
    if not lines:
        yield Finding("label", name, "no labels; expected a line NAME INDEX per image")
    for line in lines:
        if line.error:
            yield Finding("label", name, f"line {line.number}: {line.error}")
        if line.name and line.name not in images:
            yield Finding("label", name, f"line {line.number}: val/ has no image {line.name}")
        if num_classes is not None and line.label >= num_classes:
            yield Finding(
                "label", name, f"line {line.number}: label {line.label}, the classes are 0..{num_classes - 1}"
            )
    for image in sorted(images - {line.name for line in lines}):
        yield Finding("unlabelled", f"val/{image}", f"is not in {name}", is_note=True)
