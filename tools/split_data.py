"""Divide one folder of class folders into the train/ and val/ that training needs.

    python tools/split_data.py photos dataset
    python tools/split_data.py photos dataset --val-percent 10 --group-by folder

DIR holds one folder per class, with images at any depth, and stays as it is. OUT/train/CLASS and OUT/val/CLASS get its
images as hard links, or as copies on another disk. Photographs that EXIF says to turn, as phones store them, are
written turned. What tools/check_data.py would exclude is left out: files that do not decode, copies of a training
image, images that are in two classes.

The same arguments choose the same images. Where several photographs show one object, put them into one folder each
below their class and give --group-by folder, or validation will show what training has seen.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import shutil
import sys
import typing
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from PIL import Image, ImageOps

from common import cli, files, parallel
from common.data import audit, audit_report, decode, file_tree, index
from common.errors import UserError
from common.progress import Progress
from tools import check_data


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Options of this program."""

    val_percent: float = cli.option(20.0, "share of each class for validation, percent; at least one", above=0, high=90)
    seed: int = cli.option(0, "chooses the images", low=0)
    group_by: str = cli.option(
        "image", "what is not divided: an image, or all images of a folder below its class", choices=("image", "folder")
    )
    upright: bool = cli.option(True, "write photographs turned as EXIF says; otherwise EXIF is ignored")
    workers: int = cli.option(0, "processes; 0 is one per core", "-j", low=0)

    def __post_init__(self) -> None:
        cli.check_ranges(self)


_ENCODINGS: dict[str, dict[str, Any]] = {"JPEG": dict(quality=95, subsampling=0), "WEBP": dict(lossless=True)}


class _File(typing.NamedTuple):
    """One file to make."""

    source: str
    target: str
    turned: bool


def validation_names(names: Sequence[str], config: SplitConfig) -> set[str]:
    """The images of one class to validate with: about --val-percent, of whole groups, and never all.

    Args:
      names: paths of the images, `CLASS/...`.
    Raises:
      UserError: there is one group only.
    """
    groups = collections.defaultdict[str, list[str]](list)
    for name in names:
        folder = os.path.dirname(name)
        groups[folder if config.group_by == "folder" and "/" in folder else name].append(name)
    label = names[0].partition("/")[0]
    if len(groups) < 2:
        below = " in one folder below it" if len(names) > 1 else ""
        raise UserError(
            f"DIR: class {label} has {len(names)} usable image{'s' * (len(names) > 1)}{below}; training and validation "
            "need one each; add images, or remove the class"
        )

    def draw(key: str) -> bytes:
        text = f"{config.seed}\0{file_tree.nfc(key)}"
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()

    wanted = max(1, round(len(names) * config.val_percent / 100))
    chosen: list[str] = []
    for key in sorted(groups, key=draw)[:-1]:  # the last one is for training, whatever its size
        if len(chosen) + len(groups[key]) <= wanted:
            chosen += groups[key]
    smallest: list[str] = min(groups.values(), key=len)
    return set(chosen or smallest)


def usable_images(folder: str, config: SplitConfig) -> tuple[index.FolderIndex, set[str]]:
    """The images that check_data.py would keep, and the names of those to turn; prints what is left out.

    Raises:
      UserError: no class folders, a class without images, or train/ and val/ already.
    """
    parts = [name for name in ("train", "val") if os.path.isdir(os.path.join(folder, name))]
    if parts:
        found = " and ".join(f"{name}/" for name in parts)
        what = "it is divided already" if len(parts) == 2 else f"give {os.path.join(folder, parts[0])}"
        raise UserError(f"DIR: {folder} holds {found}; {what}, or rename what is a class")
    images = index.load_folder(folder, "DIR")
    if images.places is not None:
        raise UserError(f"DIR: {folder} is packed; give the folder that it was made from")
    if wrong := file_tree.only_class(folder, images.classes):
        raise UserError(f"DIR: {folder} {wrong}")
    store = audit.Store(folder)
    try:
        splits = store.list_files()
        check_data.examine_all(store, config.workers)
        found_all = list(audit_report.find(store, splits, max_imbalance=0))
    finally:
        store.close()
    turned = {each.path for each in found_all if each.kind == "turned"}
    shown = collections.defaultdict(list)
    for each in found_all:
        if each.exclude or each.kind == "unread" or (each.kind == "ignored" and file_tree.is_image(each.path)):
            shown[each.kind].append(each)
    for kind, findings in shown.items():
        print(f"left out, {kind}: {len(findings)}")
        for each in findings[: check_data.SHOWN]:
            print(f"  {each.path}: {each.reason}")
        if len(findings) > check_data.SHOWN:
            print(f"  ... {len(findings) - check_data.SHOWN} more; python tools/check_data.py {folder} lists all")
    kept = images.without({each.path for each in found_all if each.exclude})
    emptied = sorted(set(range(len(images.classes))) - set(kept.labels.tolist()))
    if emptied:
        name = images.classes[emptied[0]]
        raise UserError(f"DIR: no image of class {name} is usable, as listed above; add others, or remove the class")
    return kept, turned


def place(file: _File) -> None:
    """Make one file: turned, or a hard link, or a copy."""
    os.makedirs(os.path.dirname(file.target), exist_ok=True)
    if file.turned:
        image = ImageOps.exif_transpose(decode.open_rgb(file.source))
        kind = Image.registered_extensions().get(pathlib.PurePath(file.source).suffix.lower(), "JPEG")
        image.save(file.target, kind, **_ENCODINGS.get(kind, {}))
        return
    source = os.path.realpath(file.source)
    try:
        os.link(source, file.target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(source, file.target)


def split(folder: str, out: pathlib.Path, config: SplitConfig) -> None:
    """Write OUT, whole or not at all."""
    images, turned = usable_images(folder, config)
    by_class: dict[int, list[str]] = collections.defaultdict(list)
    for label, name in zip(images.labels.tolist(), images.names(), strict=True):
        by_class[label].append(name)
    val = set().union(*(validation_names(names, config) for names in by_class.values()))
    turned = {name for name in images.names() if name in turned} if config.upright else set()
    with files.atomic_folder(out) as draft:
        todo = [
            _File(images.path(i), os.path.join(draft, "val" if name in val else "train", name), name in turned)
            for i, name in enumerate(images.names())
        ]
        with Progress(len(todo), "images") as advance:
            for _ in parallel.imap_unordered(place, todo, config.workers):
                advance(1)
    print(
        f"{out}: {len(images) - len(val)} images for training, {len(val)} for validation, in {len(images.classes)} "
        f"classes{f'; {len(turned)} were turned as EXIF says' if turned else ''}. One validation image is "
        f"{100 / len(val):.2g} % of the accuracy."
    )
    if turned:
        print("Photographs to classify later need the same: --upright of demo.py and preprocess.py.")


def main() -> None:
    parser = cli.parser_for(SplitConfig(), __doc__)
    parser.add_argument("folder", metavar="DIR", help="folder of class folders")
    parser.add_argument("out", metavar="OUT", type=pathlib.Path, help="folder to make")
    given = vars(parser.parse_args())
    folder, out, config = given.pop("folder"), given.pop("out"), SplitConfig(**given)
    if not os.path.isdir(folder):
        raise UserError(f"DIR: {folder} is not a folder")
    if pathlib.Path(folder).resolve() in out.resolve().parents:
        raise UserError(f"OUT: {out} is inside of DIR, where it would be a class; name a folder elsewhere")
    with files.claimed(out, "OUT"):
        if out.exists() and (not out.is_dir() or not files.is_empty(out)):
            raise UserError(f"OUT: {out} exists; name a new folder")
        try:
            split(folder, out, config)
        except OSError as error:
            raise UserError(f"OUT: {out}: {error}") from error


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
