"""Images -> the raw input files that ais_bench, and run_onnx in its place, feed to a network.

float32 files are normalized CHW, byte for byte what the published single-process programs write; uint8 files are HWC
pixels whose normalization happens on the device (AIPP). Imports no torch, and numpy only where it computes: their
imports take longer than many images.
"""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import time

from common import cli, parallel
from common.data.decode import EXTENSIONS, open_rgb
from common.data.transforms import eval_crop, eval_transform, normalize_into
from common.errors import UserError
from common.files import write_atomic
from common.progress import Progress

SETTINGS = "preprocess.json"  # in the output folder; ais_bench reads only .bin and .npy there
FILES_PER_TASK = 8
ACCEPTED_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # what ais_bench takes since 2024


@dataclasses.dataclass(frozen=True)
class PreprocessConfig:
    """Options of the preprocess scripts."""

    src_path: str = cli.option("", "folder of images, not searched in depth")
    save_path: str = cli.option("", "folder for the input files, one per image; created")
    dtype: str = cli.option(
        "float32", "float32: normalized CHW; uint8: HWC pixels for a model with AIPP", choices=("float32", "uint8")
    )
    format: str = cli.option(
        "bin", "bin: raw little-endian numbers; npy: the same with numpy's header", choices=("bin", "npy")
    )
    workers: int = cli.option(0, "processes; 0 is one per core", low=0)
    resume: bool = cli.option(True, "keep the files of an earlier run whose image has not changed since")
    image_size: int | None = cli.option(None, "side of the input, pixels (default: the model's)", low=1)

    def __post_init__(self):
        cli.check_ranges(self)


def main(spec, description, recipe=None, argv=None):
    """Body of a model's preprocess script; `recipe` holds the model's defaults."""
    with cli.exit_on_error():
        config, _ = cli.parse(recipe or PreprocessConfig(), description, argv)
        for flag, value in (("--src-path", config.src_path), ("--save-path", config.save_path)):
            if not value:
                raise UserError(f"{flag}: missing, it needs a folder")
        preprocess(spec, config)


def preprocess(spec, config):
    """Convert a folder of images.

    Args:
      spec: ModelSpec, for the transform and the normalization.
      config: PreprocessConfig.
    Returns:
      (converted, kept): numbers of files written now and left from an earlier run.
    Raises:
      UserError: no images, names that collide, a folder of another model's files, a full disk, a broken image.
    """
    start = time.perf_counter()
    size = config.image_size or spec.input_size
    spec.check_image_size(size)
    images = list_images(config.src_path)
    target = pathlib.Path(config.save_path)
    names = {path: f"{path.name.partition('.')[0]}.{config.format}" for path in images}
    encoder = Encoder(spec, size, config.dtype, config.format)
    settings = {
        "model": spec.name,
        "image_size": size,
        "resize": spec.resize_for(size),
        "dtype": config.dtype,
        "crop_rounding": spec.crop_rounding,
        "mean": list(spec.mean),
        "std": list(spec.std),
    }
    present = _claim_folder(target, settings, set(names.values()), config)
    todo = [
        path
        for path in images
        if names[path] not in present or not is_current(path, target / names[path], encoder.file_size)
    ]
    _check_space(target, len(todo) * encoder.file_size)
    _convert_all(todo, encoder, target, names, config.workers)
    seconds = time.perf_counter() - start
    print(
        f"{target}: {len(todo)} files of {encoder.file_size} bytes written in {seconds:.1f} s "
        f"({len(todo) / seconds:.1f} images/s), {len(images) - len(todo)} kept from an earlier run",
        flush=True,
    )
    return len(todo), len(images) - len(todo)


def list_images(folder):
    """The image files of a flat folder, sorted by name.

    Raises:
      UserError: no such folder, no image in it, or two names that are equal up to their first dot, which is where
        ais_bench cuts the names of its results.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"--src-path: {folder} is not a folder")
    with os.scandir(folder) as entries:
        everything = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    names = [name for name in everything if name.lower().endswith(EXTENSIONS)]
    if not names:
        raise UserError(
            f"--src-path: {folder} has no images among its {len(everything)} entries; expected a flat "
            f"folder of {', '.join(EXTENSIONS[:3])} and the like"
        )
    if len(everything) > len(names):
        print(f"{folder}: {len(everything) - len(names)} entries that are no images are left out", flush=True)
    first_of = {}
    for name in names:
        stem = name.partition(".")[0]
        other = first_of.setdefault(stem, name)
        if other != name:
            raise UserError(
                f"--src-path: {other} and {name} in {folder} would both be called {stem}, names are cut at "
                "the first dot; rename one"
            )
        if not ACCEPTED_NAME.fullmatch(stem):
            print(
                f"note: {name}: ais_bench refuses names with other characters than A-Z a-z 0-9 _ -; rename it "
                "before running on an NPU",
                flush=True,
            )
    return [folder / name for name in names]


class Encoder:
    """Turns a PIL image into the bytes of one input file; the buffer of a float32 one is reused from image to image.

    Attributes:
      file_size: bytes of every file.
    """

    def __init__(self, spec, size, dtype, format):
        self.spec, self.header = spec, b""
        self.crop = eval_transform(spec, size, to=eval_crop)
        shape, item_size = ((3, size, size), 4) if dtype == "float32" else ((size, size, 3), 1)
        if format == "npy":
            self.header = _npy_header(dtype, (1, *shape))
        self.buffer = None
        if dtype == "float32":
            import numpy as np

            # A fresh megabyte per image costs as much in page faults as the arithmetic itself.
            self.buffer = np.empty(shape, dtype)
        self.file_size = len(self.header) + item_size * size * size * 3

    def encode(self, image):
        """The numbers of a PIL RGB image as bytes or an array, in the very operations of the published programs."""
        cropped = self.crop(image)
        if self.buffer is None:
            return cropped.tobytes()
        import numpy as np

        normalize_into(self.buffer, np.asarray(cropped), self.spec.mean, self.spec.std)
        return self.buffer

    def write(self, source, target):
        """Convert one file; the target appears whole, and carries the time of its source as the mark of being done."""
        stamp = os.stat(source).st_mtime_ns
        numbers = self.encode(open_rgb(source))
        write_atomic(target, self.header, memoryview(numbers), mode=0o640, mtime_ns=stamp, suffix=".part")


def _npy_header(dtype, shape):
    import numpy as np

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    return header.getvalue()


def is_current(source, target, file_size):
    """Whether `target` is the finished conversion of `source` as it is now."""
    try:
        done = target.stat()
    except FileNotFoundError:
        return False
    # Microseconds: some file systems keep no finer times.
    return done.st_size == file_size and done.st_mtime_ns // 1000 == source.stat().st_mtime_ns // 1000


def _claim_folder(target, settings, expected, config):
    """Create the output folder, or make sure that what it holds belongs to this very conversion.

    Returns:
      set: names of the input files that an earlier run left there.
    """
    record = target / SETTINGS
    try:
        target.mkdir(parents=True, exist_ok=True, mode=0o750)
        present = {path.name for path in target.iterdir() if path.suffix.lower() in (".bin", ".npy")}
        strangers = sorted(present - expected)
        if strangers:
            raise UserError(
                f"--save-path: {target} holds {len(strangers)} input files that belong to no image of "
                f"--src-path, for example {strangers[0]}; remove them or choose another folder"
            )
        if present and not config.resume:
            for name in present:
                (target / name).unlink()
            present = set()
        elif present:
            found = json.loads(record.read_text()) if record.exists() else {}
            other = [
                f"{key} {found.get(key)} instead of {settings[key]}"
                for key in settings
                if found.get(key) != settings[key]
            ]
            if other:
                raise UserError(
                    f"--save-path: {target} holds files made with {', '.join(other)}; choose another "
                    "folder, or --no-resume to replace them"
                )
        write_atomic(record, json.dumps(settings) + "\n")
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--save-path: {target}: {error}") from error
    return present


def _check_space(target, needed):
    free = shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"--save-path: {target} needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB free; "
            "--dtype uint8 takes a quarter, eval.py needs no files at all"
        )


_worker = {}


def _start_worker(encoder, pairs):
    _worker.update(encoder=encoder, pairs=pairs)


def _convert_some(first):
    pairs = _worker["pairs"][first : first + FILES_PER_TASK]
    for source, target in pairs:
        _worker["encoder"].write(source, target)
    return len(pairs)


def _convert_all(todo, encoder, target, names, workers):
    """Spread the files over processes; the first failure stops the rest and is raised here."""
    pairs = [(str(path), str(target / names[path])) for path in todo]
    tasks = range(0, len(pairs), FILES_PER_TASK)
    with Progress(len(todo), "images") as advance:
        try:
            for count in parallel.unordered(_convert_some, tasks, workers, _start_worker, (encoder, pairs)):
                advance(count)
        except OSError as error:
            raise UserError(f"--save-path: {target}: {error}") from error
