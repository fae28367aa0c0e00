"""Write a data set as few large tar files, for network disks and slow processors.

    python tools/pack_data.py /data/imagenet /data/packed
    python tools/pack_data.py /data/imagenet /data/packed --short-side 400 --quality 90
    python tools/pack_data.py /data/imagenet /bucket/packed --shard 2/8     on the second of eight machines
    python tools/pack_data.py /data/packed --verify

DIR holds train/ and val/, or class folders itself. `--data OUT` of train.py and eval.py reads the same images in the
same order from OUT. The tar files are those of webdataset (KEY.jpg, KEY.cls), with images of all classes mixed;
OUT/_info.json is what timm reads. Without --short-side and --quality the images are copied unchanged, and the data set
keeps its fingerprint; with them, it is another one, and its accuracy is not that of the original.

An interrupted run continues with the tar files that are missing. Files that do not decode are copied as they are.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import sys
import tarfile
import typing
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli, parallel
from common.data import file_tree, index, labels, packed
from common.data.decode import BadImage, open_rgb
from common.data.transforms import resize_short_side
from common.errors import UserError
from common.files import atomic_path, claimed, is_empty, make_folders, write_atomic
from common.progress import Progress

_BLOCK = tarfile.BLOCKSIZE
_EXTENSIONS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}  # webdataset's; other files keep theirs


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Options of this program."""

    short_side: int = cli.option(
        0, "encode images anew, shrunk to this short side where theirs is larger; 0: keep", low=0
    )
    quality: int = cli.option(
        0, "encode images anew as JPEG of this quality; 0: keep, or 90 with --short-side", low=0, high=100
    )
    images_per_file: int = cli.option(5000, "images in a tar file", low=1)
    shard: str = cli.option("1/1", "I/N: pack the I-th of N equal parts; run all of them, on as many machines")
    workers: int = cli.option(0, "processes; 0 is one per core", "-j", low=0)
    label_numbers: str = labels.numbers_option()
    verify: bool = cli.option(False, "check the tar files in DIR and their lists, and write nothing")

    def __post_init__(self) -> None:
        cli.check_ranges(self)
        part, parts = self.part
        if not 1 <= part <= parts:
            raise UserError(f"--shard: {self.shard}, must be I/N with I from 1 to N")

    @property
    def part(self) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        return (int(match[1]), int(match[2])) if match else (0, 0)

    @property
    def encoding(self) -> str:
        """How images are encoded anew; empty: not at all."""
        if not self.short_side and not self.quality:
            return ""
        side = f"short side {self.short_side}, " if self.short_side else ""
        return f"{side}JPEG quality {self.quality or 90}"


class _Shard(typing.NamedTuple):
    """One tar file to write: its path, and positions of its images in the index."""

    path: str
    positions: np.ndarray


_job: dict[str, Any] = {}  # of a worker process: index, options, fingerprint


def _setup(images: index.FolderIndex, config: PackConfig, fingerprint: str) -> None:
    _job.update(images=images, config=config, fingerprint=fingerprint)


def _encoded(content: bytes, name: str, config: PackConfig) -> bytes:
    """The image, encoded anew where that was asked for and it does not grow."""
    if not config.encoding:
        return content
    try:
        image = open_rgb(name, content)
    except BadImage:
        return content
    small = image
    if config.short_side and min(image.size) > config.short_side:
        small = resize_short_side(image, config.short_side)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=config.quality or 90, optimize=True)
    return file.getvalue() if small is not image or file.tell() < len(content) else content


def _write_shard(shard: _Shard) -> tuple[int, int, int]:
    """Write a tar file and the list beside it; returns (images, bytes before, bytes after)."""
    images, config = _job["images"], _job["config"]
    positions = shard.positions.tolist()
    digest, offsets, sizes, names, before = hashlib.sha256(), list[int](), list[int](), list[str](), 0
    source = _stamps(images, shard)  # before they are read
    with claimed(shard.path, "OUT"), atomic_path(shard.path) as draft, open(draft, "wb") as file:

        def add(name: str, content: bytes) -> int:
            """Append a member; returns the position of its content."""
            header = tarfile.TarInfo(name)
            header.size = len(content)
            start = file.tell() + _BLOCK
            for part in (header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % _BLOCK)):
                file.write(part)
                digest.update(part)
            return start

        for i in positions:
            name = images.name(i)
            content = images.read(i)
            if content is None:
                content = pathlib.Path(images.path(i)).read_bytes()
            before += len(content)
            content = _encoded(content, name, config)
            extension = next((end for begin, end in _EXTENSIONS.items() if content.startswith(begin)), "")
            extension = extension or pathlib.PurePath(name).suffix[1:].lower()
            offsets.append(add(f"{i:09d}.{extension}", content))
            sizes.append(len(content))
            names.append(name)
            add(f"{i:09d}.cls", str(int(images.labels[i])).encode())
        end = bytes(2 * _BLOCK)
        file.write(end)
        digest.update(end)
        file.flush()
        os.fsync(file.fileno())
        tar_bytes = file.tell()
    listing = dict(
        fingerprint=_job["fingerprint"],
        encoding=config.encoding,
        bytes=tar_bytes,
        source=source,
        sha256=digest.hexdigest(),
        positions=positions,
        labels=images.labels[shard.positions].tolist(),
        offsets=offsets,
        sizes=sizes,
        names=names,
    )
    write_atomic(packed.list_of(shard.path), json.dumps(listing))
    return len(positions), before, sum(sizes)


def _is_done(shard: _Shard, images: index.FolderIndex, encoding: str) -> bool:
    """Whether an earlier run finished this tar file, from images that have not changed since."""
    try:
        listing = json.loads(pathlib.Path(packed.list_of(shard.path)).read_text())
        expected = dict(fingerprint=images.fingerprint, encoding=encoding, bytes=os.path.getsize(shard.path))
        is_same = all(listing[key] == value for key, value in expected.items())
        # Lists of earlier versions do not say of which files they are.
        return is_same and listing.get("source", source := _stamps(images, shard)) == source
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _stamps(images: index.FolderIndex, shard: _Shard) -> str:
    """Hash of sizes and modification times.

    Raises:
      UserError: an image is not there.
    """
    stamps = []
    for i in shard.positions.tolist():
        try:
            stamps.append(images.stamp(i))
        except OSError as error:
            raise UserError(
                f"DIR: {images.path(i)} cannot be read ({error.strerror}); tools/check_data.py lists all such files"
            ) from error
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()


def _shards(folder: pathlib.Path, name: str, num_images: int, images_per_file: int) -> list[_Shard]:
    """The tar files of a split: images in a fixed random order, so that programs that read one after the other mix."""
    order = np.argsort(np.random.Philox(np.random.SeedSequence(num_images)).random_raw(num_images), kind="stable")
    parts = np.array_split(order, -(-num_images // images_per_file))
    return [_Shard(str(folder / f"{name}-{i:06d}.tar"), np.sort(part)) for i, part in enumerate(parts)]


def _source(root: pathlib.Path, name: str, numbers: str) -> index.FolderIndex:
    folder = root / name if name else root
    label_file = root / "val_label.txt"
    if name == "val" and label_file.is_file():
        classes = file_tree.class_names(str(root / "train"))[0] if (root / "train").is_dir() else ()
        images = index.load_flat(folder, label_file, "DIR", classes, numbers)
    else:
        images = index.load_folder(folder, "DIR")
    if images.places is not None:
        raise UserError(f"DIR: {images.root} is packed already; give the folder that it was made from")
    return images


def pack_split(images: index.FolderIndex, out: pathlib.Path, name: str, config: PackConfig) -> dict[str, Any]:
    """Pack one split, "" for a data set of class folders alone; returns its entry of _info.json."""
    folder = out / name if name else out
    shards = _shards(folder, name or "images", len(images), config.images_per_file)
    manifest = dict(
        format=packed.FORMAT,
        classes=list(images.classes),
        images=len(images),
        ignored=images.ignored,
        fingerprint=images.fingerprint,
        encoding=config.encoding,
        shards=[os.path.basename(shard.path) for shard in shards],
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if packed.is_packed(folder):
            found = packed.read_manifest(folder, "OUT")
            changed = [key for key, value in manifest.items() if found.get(key) != value]
            if changed:
                raise UserError(
                    f"OUT: {folder} holds a set of other {', '.join(changed)}; choose another folder, or remove it"
                )
        elif not is_empty(folder):
            raise UserError(f"OUT: {folder} is not empty and holds no packed set; choose another folder")
        write_atomic(folder / packed.MANIFEST, json.dumps(manifest))
        if images.label_file:
            shutil.copyfile(images.label_file, out / "val_label.txt")
        part, parts = config.part
        mine = shards[part - 1 :: parts]
        todo = [shard for shard in mine if not _is_done(shard, images, config.encoding)]
        before = after = 0
        with Progress(sum(len(shard.positions) for shard in todo), "images") as advance:
            setup = (images, config, images.fingerprint)
            for count, read, written in parallel.imap_unordered(_write_shard, todo, config.workers, _setup, setup):
                before, after = before + read, after + written
                advance(count)
    except OSError as error:
        raise UserError(f"OUT: {folder}: {error}") from error
    smaller = f", {before / 1e6:.1f} MB of images became {after / 1e6:.1f} MB" if todo and config.encoding else ""
    print(
        f"{folder}: {len(todo)} of {len(shards)} tar files written, {len(mine) - len(todo)} kept from an earlier run"
        f"{smaller}"
    )
    return dict(
        name=name or "train",
        num_samples=len(images),
        filenames=[os.path.relpath(shard.path, out) for shard in shards],
        shard_lengths=[len(shard.positions) for shard in shards],
    )


def _verify_file(path: str) -> str:
    """What is wrong with a tar file, or an empty text."""
    digest = hashlib.sha256()
    try:
        listing = json.loads(pathlib.Path(packed.list_of(path)).read_text())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        expected = listing["sha256"]
    except (OSError, ValueError) as error:
        return f"{path}: {error}"
    except (KeyError, TypeError):
        return f"{path}: {packed.list_of(path)} is damaged; remove it and pack again"
    return "" if digest.hexdigest() == expected else f"{path}: its checksum is wrong; remove and pack it again"


def verify(root: pathlib.Path, workers: int) -> int:
    """Compare tar files with their checksums, and names and labels of class folders with the fingerprint.

    Returns:
      how many are wrong.
    """
    folders = [folder for folder in (root, root / "train", root / "val") if packed.is_packed(folder)]
    if not folders:
        raise UserError(f"DIR: {root} holds no packed data set; give the folder that was OUT")
    paths = [str(folder / name) for folder in folders for name in packed.read_manifest(folder, "DIR")["shards"]]
    with concurrent.futures.ThreadPoolExecutor(workers or parallel.usable_cores()) as pool:
        wrong = list(filter(None, pool.map(_verify_file, paths)))
    for folder in [] if wrong else folders:
        read = index.read_packed if packed.read_manifest(folder, "DIR")["classes"] else packed.load
        try:
            read(str(folder), "DIR")
        except UserError as error:
            wrong.append(str(error))
    for line in wrong:
        print(line)
    print(f"{len(paths)} tar files with their lists, {len(wrong)} wrong")
    return len(wrong)


def main() -> int:
    parser = cli.parser_for(PackConfig(), __doc__)
    parser.add_argument("folder", metavar="DIR", type=pathlib.Path, help="dataset root")
    parser.add_argument("out", metavar="OUT", type=pathlib.Path, nargs=argparse.OPTIONAL, help="folder to write to")
    given = vars(parser.parse_args())
    root, out, config = given.pop("folder"), given.pop("out"), PackConfig(**given)
    if not root.is_dir():
        raise UserError(f"DIR: {root} is not a folder")
    if config.verify:
        if out is not None:
            raise UserError(f"OUT: {out}, but --verify checks DIR and writes nothing; leave it out")
        return 1 if verify(root, config.workers) else 0
    if out is None:
        raise UserError("OUT: missing; give the folder to write to")
    if out.resolve() == root.resolve():
        raise UserError(f"OUT: {out} is DIR; choose another folder")
    names = [name for name in ("train", "val") if (root / name).is_dir()] or [""]
    for name in names:
        if out.resolve().is_relative_to((root / name).resolve()):
            raise UserError(f"OUT: {out} is in {root / name}, whose images are packed; choose a folder outside")
    make_folders(out, "OUT")
    part, parts = config.part
    with claimed(out if parts == 1 else out / f"shard-{part}-of-{parts}", "OUT"):
        sources = {name: _source(root, name, config.label_numbers) for name in names}  # all, before the first is packed
        splits = {name or "train": pack_split(images, out, name, config) for name, images in sources.items()}
        write_atomic(out / "_info.json", json.dumps({"splits": splits}))
    return 0


if __name__ == "__main__":
    with cli.exit_on_error():
        sys.exit(main())
