"""preprocess.py of every model: images -> raw input files for ais_bench and run_onnx.

float32 files are normalized CHW, byte for byte those of the published single-process programs; float16 files are the
same, rounded; uint8 files are HWC pixels for a model that normalizes on the device (AIPP). Imports no torch, and numpy
for float16 and .npy files only: importing them takes longer than converting many images.
"""

import collections
import dataclasses
import io
import json
import os
import pathlib
import shutil
import sys
import time
import typing
from collections.abc import Sequence
from typing import Any

from common import cli, parallel
from common.data import file_tree
from common.data.decode import EXTENSIONS, BadImage, open_rgb
from common.data.transforms import eval_crop_transform, normalized_levels
from common.deploy import file_names
from common.errors import UserError
from common.files import claimed, make_folders, write_atomic
from common.progress import Progress
from common.spec import ModelSpec

if typing.TYPE_CHECKING:
    from PIL import Image

FILES_PER_TASK = 8
_RULES = 2  # raise it when common/data/decode.py reads other pixels from a file, or when is_current changes


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """Options of the preprocess scripts."""

    src_path: str = cli.option("", "folder of images, not searched in depth", required="the folder of images")
    save_path: str = cli.option(
        "", "folder for the input files, one per image; created", required="the folder for the input files"
    )
    dtype: str = cli.option(
        "float32",
        "float32, float16: normalized CHW; uint8: HWC pixels for a model with AIPP",
        choices=("float32", "float16", "uint8"),
    )
    format: str = cli.option(
        "bin", "bin: raw little-endian numbers; npy: the same with numpy's header", choices=("bin", "npy")
    )
    workers: int = cli.option(0, "processes; 0 is one per core", low=0)
    on_bad_image: str = cli.option(
        "fail", "what to do with a file that does not decode; skip leaves it out", choices=("fail", "skip")
    )
    resume: bool = cli.option(True, "keep the files of an earlier run whose image has not changed since")
    image_size: int | None = cli.option(None, "side of the input, pixels (default: the model's)", low=1)
    upright: bool = cli.option(False, "turn photographs as EXIF says, for a network trained on turned ones")

    def __post_init__(self) -> None:
        cli.check_ranges(self)


def main(spec: ModelSpec, description: str) -> None:
    """Body of a model's preprocess script."""
    size, num_bytes = spec.input_size, 3 * spec.input_size**2
    description += f"""
Writes one float32 CHW 3x{size}x{size} file ({4 * num_bytes:,} bytes) per image; with --dtype float16 one of half that
size, for a model with float16 input; with --dtype uint8 one HWC file ({num_bytes:,} bytes), for a model that was
converted with AIPP.
"""
    with cli.exit_on_error():
        config, _ = cli.parse(PreprocessConfig(), description)
        preprocess(spec, config)


def preprocess(spec: ModelSpec, config: PreprocessConfig) -> None:
    """Convert a folder of images, those that are missing or have changed since an earlier run.

    Raises:
      UserError: no images, names that collide, files of another conversion, too little space, or an image that does
        not decode (with --on-bad-image skip: none does).
    """
    start = time.perf_counter()
    size = config.image_size or spec.input_size
    spec.check_image_size(size)
    images = list_images(config.src_path)
    folder = pathlib.Path(config.save_path)
    if folder.exists() and folder.samefile(config.src_path):
        raise UserError(f"--save-path: {folder} is --src-path; name another folder")
    targets = {path: folder / f"{file_names.stem(path.name)}.{config.format}" for path in images}
    encoder = Encoder(spec, size, config.dtype, config.format, config.upright)
    settings = {
        "model": spec.name,
        "image_size": size,
        "resize": spec.resize_for(size),
        "dtype": config.dtype,
        "crop_rounding": spec.crop_rounding,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "rules": _RULES,
        "upright": config.upright,
    }
    make_folders(folder, "--save-path", 0o750)
    with claimed(folder, "--save-path"):
        present = _prepare_folder(folder, settings, {path.name for path in targets.values()}, config.resume)
        todo = [
            (path, target)
            for path, target in targets.items()
            if target.name not in present or not is_current(path, target, encoder.file_size)
        ]
        _check_space(folder, len(todo) * encoder.file_size)
        skipped = _convert(todo, encoder, folder, config.workers, config.on_bad_image)
    for path, reason in sorted(skipped):
        print(f"skipped: {path} ({reason})", file=sys.stderr, flush=True)
    if len(skipped) == len(images):
        raise UserError(f"--src-path: {config.src_path} has {len(images)} images, and none of them decodes")
    seconds, written = time.perf_counter() - start, len(todo) - len(skipped)
    left_out = f", {len(skipped)} left out; postprocess.py then needs --allow-missing" if skipped else ""
    print(
        f"{folder}: {written} files of {encoder.file_size} bytes written in {seconds:.1f} s "
        f"({written / seconds:.1f} images/s), {len(images) - len(todo)} kept from an earlier run{left_out}",
        flush=True,
    )


def list_images(argument: str) -> list[pathlib.Path]:
    """The images in the folder of --src-path, sorted by name.

    Raises:
      UserError: no such folder, no image in it, or two images whose results would have the same name.
    """
    folder = pathlib.Path(argument)
    if not folder.is_dir():
        raise UserError(f"--src-path: {folder} is not a folder")
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    paths = [folder / entry.name for entry in entries if file_tree.is_image(entry.name) and not entry.is_dir()]
    others = [entry for entry in entries if entry.is_dir() or not file_tree.is_image(entry.name)]
    text = f"{len(others)} entries that are no images are left out{_describe(others)}" if others else ""
    if not paths:
        raise UserError(
            f"--src-path: {folder} has no images among its {len(entries)} entries; expected a flat folder of "
            f"{', '.join(EXTENSIONS[:3])} and the like{'; ' * bool(text)}{text}"
        )
    if text:
        print(f"{folder}: {text}", flush=True)
    file_names.check_stems("--src-path", paths)
    for path in paths:
        if not file_names.is_accepted(file_names.stem(path.name), "ais_bench"):
            print(
                f"note: {path.name}: ais_bench since 2024 refuses names with characters other than A-Z a-z 0-9 _ -; "
                "rename it before running on an NPU",
                flush=True,
            )
    return paths


def _describe(others: Sequence["os.DirEntry[str]"]) -> str:
    """How many entries that are no images are folders, hidden, or images in formats that are not read."""
    kinds = collections.Counter(
        "folder" if entry.is_dir() and not file_tree.is_hidden(entry.name) else file_tree.kind_ignored(entry.name)
        for entry in others
    )
    texts = [f"{kinds['folder']} folders, which are not searched"] if kinds["folder"] else []
    texts += filter(None, [file_tree.describe_ignored(kinds)])
    return f": {', '.join(texts)}" if texts else ""


class Encoder:
    """Turns images into the bytes of input files. Normalization is a table of the 256 levels of each channel.

    Attributes:
      file_size: bytes of every file.
    """

    def __init__(self, spec: ModelSpec, size: int, dtype: str, format: str, upright: bool = False) -> None:
        self._crop, self._dtype = eval_crop_transform(spec, size, upright), dtype
        self._levels = [normalized_levels(mean, std) for mean, std in zip(spec.mean, spec.std, strict=True)]
        shape = (size, size, 3) if dtype == "uint8" else (3, size, size)
        self._header = _npy_header(dtype, (1, *shape)) if format == "npy" else b""
        self.file_size = len(self._header) + {"float32": 4, "float16": 2, "uint8": 1}[dtype] * size * size * 3

    def encode(self, image: "Image.Image") -> list[bytes]:
        """The numbers of an RGB image, in parts: those that the operations of the published programs compute."""
        cropped = self._crop(image)
        if self._dtype == "uint8":
            return [cropped.tobytes()]
        planes = [
            plane.point(levels, "F").tobytes() for plane, levels in zip(cropped.split(), self._levels, strict=True)
        ]
        return [_rounded_to_half(plane) for plane in planes] if self._dtype == "float16" else planes

    def write(self, source: str, target: str) -> None:
        """Convert one file; the target's modification time is the change time of its source, for `is_current`."""
        try:
            mtime_ns = os.stat(source).st_ctime_ns
        except OSError as error:
            raise BadImage(source, error.strerror or "cannot be read") from error
        numbers = self.encode(open_rgb(source))
        write_atomic(target, self._header, *numbers, mode=0o640, mtime_ns=mtime_ns, suffix=".part")


def _rounded_to_half(plane: bytes) -> bytes:
    import numpy as np

    return np.frombuffer(plane, np.float32).astype("<f2").tobytes()


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    import numpy as np

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    return header.getvalue()


def is_current(source: pathlib.Path, target: pathlib.Path, file_size: int) -> bool:
    """Whether `target` is the finished conversion of `source` as it is now.

    Change times (ctime) cannot be set: a file that replaces another one differs in it, whatever its size and
    modification time.
    """
    try:
        done, changed_ns = target.stat(), source.stat().st_ctime_ns
    except FileNotFoundError:
        return False
    # Microseconds: some file systems keep no finer times.
    return done.st_size == file_size and done.st_mtime_ns // 1000 == changed_ns // 1000


def _prepare_folder(folder: pathlib.Path, settings: dict[str, Any], expected: set[str], resume: bool) -> set[str]:
    """Check that the input files in the output folder come from the same images and settings.

    Returns:
      names of the input files that an earlier run left; none without `resume`, which removes them.
    """
    record = folder / file_names.SETTINGS
    try:
        present = {path.name for path in folder.iterdir() if path.suffix.lower() in (".bin", ".npy")}
        unexpected = sorted(present - expected)
        if unexpected:
            raise UserError(
                f"--save-path: {folder} holds {len(unexpected)} input files that belong to no image of "
                f"--src-path, for example {unexpected[0]}; remove them or choose another folder"
            )
        found: dict[str, Any] = {"upright": False}  # also where an older version wrote the record
        found |= json.loads(record.read_text()) if present and resume and record.exists() else {}
        if present and resume:
            different = [
                f"{key} {found.get(key)} instead of {value}"
                for key, value in settings.items()
                if found.get(key) != value and key != "rules"
            ]
            if different:
                raise UserError(
                    f"--save-path: {folder} holds files made with {', '.join(different)}; choose another "
                    "folder, or --no-resume to replace them"
                )
        if not resume or found.get("rules") != settings["rules"]:
            for name in present:
                (folder / name).unlink()
            present = set()
        write_atomic(record, json.dumps(settings) + "\n", mode=0o640)
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # of json
        raise UserError(
            f"--save-path: {record} is damaged ({error}); --no-resume makes the input files again"
        ) from error
    except OSError as error:
        raise UserError(f"--save-path: {folder}: {error}") from error
    return present


def _check_space(folder: pathlib.Path, needed: int) -> None:
    """Raise UserError where fewer than `needed` bytes are free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--save-path: {folder} needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB free; "
            "--dtype uint8 takes a quarter, eval.py needs no files at all"
        )


_worker: dict[str, Any] = {}  # of a worker process: its encoder, and all pairs of source and target


def _init_worker(encoder: Encoder, pairs: Sequence[tuple[str, str]], on_bad_image: str) -> None:
    _worker.update(encoder=encoder, pairs=pairs, on_bad_image=on_bad_image)


def _convert_files(first: int) -> tuple[int, list[tuple[str, str]]]:
    """One task of a worker process; returns the number of its files, and (path, reason) of those that were skipped."""
    pairs, skipped = _worker["pairs"][first : first + FILES_PER_TASK], []
    for source, target in pairs:
        try:
            _worker["encoder"].write(source, target)
        except BadImage as error:
            pathlib.Path(target).unlink(missing_ok=True)  # made from the image that was there before
            if _worker["on_bad_image"] == "fail":
                raise
            skipped.append((error.path, error.reason))
    return len(pairs), skipped


def _convert(
    todo: Sequence[tuple[pathlib.Path, pathlib.Path]],
    encoder: Encoder,
    folder: pathlib.Path,
    workers: int,
    on_bad_image: str,
) -> list[tuple[str, str]]:
    """Convert the files in worker processes; the first failure stops the rest and is raised here.

    Returns:
      (path, reason) of the images that were skipped.
    """
    skipped, arguments = [], (encoder, [(str(source), str(target)) for source, target in todo], on_bad_image)
    tasks = range(0, len(todo), FILES_PER_TASK)
    with Progress(len(todo), "images") as advance:
        try:
            for count, bad in parallel.imap_unordered(_convert_files, tasks, workers, _init_worker, arguments):
                advance(count)
                skipped += bad
        except OSError as error:
            raise UserError(f"--save-path: {folder}: {error}") from error
    return skipped
