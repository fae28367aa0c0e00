"""Options, input files, results and summary of an inference run, in ais_bench's names and layouts."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from common import cli
from common.data.file_tree import is_hidden
from common.deploy import file_names
from common.errors import UserError, printable
from common.files import claimed, is_empty, make_folders, write_atomic


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """The options of ais_bench that run_onnx.py has too."""

    model: str = cli.option("", "model file", required="a model file")
    input: str = cli.option(
        "",
        "folder of .bin or .npy files, or files separated by commas; none: pure inference, which "
        "measures the network alone",
    )
    output: str = cli.option("", "parent folder of the results; none: nothing is saved")
    output_dirname: str = cli.option("", "name of the results' folder inside --output (default: the time)")
    outfmt: str = cli.option("BIN", "format of the results", choices=("BIN", "NPY", "TXT"))
    batchsize: int | None = cli.option(None, "images per run; a model built for one number takes no other", low=1)
    loop: int = cli.option(1, "repetitions of every run", low=1)
    warmup_count: int = cli.option(1, "runs of the first batch that are not counted", low=0)
    pure_data_type: str = cli.option("zero", "input of pure inference", choices=("zero", "random"))

    def __post_init__(self) -> None:
        cli.check_ranges(self)
        if self.output_dirname and not self.output:
            raise UserError("--output-dirname: needs --output")

    def resolve_batch(self, fixed: int | None) -> int | None:
        """Images per run: the fixed batch size of the model, else --batchsize.

        Raises:
          UserError: --batchsize differs from the fixed batch size.
        """
        if fixed and self.batchsize and self.batchsize != fixed:
            raise UserError(f"--batchsize: {self.batchsize}, but {self.model} was built for {fixed}")
        return fixed or self.batchsize


def natural_key(name: str) -> list[int | str]:
    """Sort key that compares runs of digits as numbers and other text in lower case."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", name)]


def list_inputs(argument: str) -> list[pathlib.Path]:
    """The input files of a run, in ais_bench's order; all .bin or all .npy.

    Args:
      argument: value of --input: one folder, or files separated by commas.
    Raises:
      UserError: no files, or files whose results would have the same name.
    """
    files = [pathlib.Path(part) for part in argument.split(",") if part]
    if len(files) == 1 and files[0].is_dir():
        (folder,) = files
        found = [entry.name for entry in os.scandir(folder) if not is_hidden(entry.name)]
        names = sorted(name for name in found if name.lower().endswith((".bin", ".npy")))
        files = [folder / name for name in sorted(names, key=natural_key)]
        if not files:
            raise UserError(f"--input: {folder} has no .bin or .npy files; make them with preprocess.py")
    elif not files or not all(path.is_file() for path in files):
        missing = [str(path) for path in files if not path.is_file()]
        raise UserError(
            f"--input: {', '.join(missing[:3]) or argument} does not exist; expected one folder, or files separated by "
            "commas"
        )
    if len({path.suffix.lower() for path in files}) > 1:
        raise UserError(f"--input: {argument} mixes .bin and .npy files")
    file_names.check_stems("--input", files)
    return files


def _made_by(files: Sequence[pathlib.Path], *keys: str) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """(folder, what its preprocess script recorded under `keys`) for the folders of `files` that have such a record."""
    for folder in dict.fromkeys(path.parent for path in files):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # files of another program
            record = json.loads((folder / file_names.SETTINGS).read_text())
            yield folder, [str(record[key]) for key in keys]


def check_network(files: Sequence[pathlib.Path], name: str) -> None:
    """Check that no other network's preprocess script made the input files.

    Args:
      name: of the model's network; empty where it is not known.
    Raises:
      UserError: the record in a folder of `files` names another network.
    """
    for folder, (made_for,) in _made_by(files, "model"):
        if name and made_for != name:
            raise UserError(
                f"--input: {folder} was made by {printable(made_for)}/preprocess.py, the model is {printable(name)}; "
                f"make its files with {printable(name)}/preprocess.py"
            )


def check_layout(files: Sequence[pathlib.Path], shape: Sequence[int]) -> None:
    """Check that the preprocess script wrote the numbers in the model's order.

    Args:
      shape: of an input file.
    Raises:
      UserError: the record in a folder of `files` says that they are in another order.
    """
    for folder, (dtype,) in _made_by(files, "dtype"):
        made, taken = (
            "N x S x S x 3" if is_last else "N x 3 x S x S" for is_last in (dtype == "uint8", shape[-1] == 3)
        )
        if made != taken:
            raise UserError(f"--input: {folder} holds {made} (--dtype {dtype}), the model takes {taken}")


def sample_bytes(path: pathlib.Path) -> int:
    """Bytes of the numbers in an input file, without the header of an .npy file."""
    if path.suffix.lower() == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False).nbytes
    return path.stat().st_size


def check_sizes(files: Sequence[pathlib.Path], expected: int, description: str) -> None:
    """Check that every input file holds one sample; ais_bench only checks that the sizes divide.

    Args:
      expected: bytes of a sample.
      description: type and shape of a sample, for the message.
    Raises:
      UserError: the first file of another size.
    """
    for path in files:
        size = sample_bytes(path)
        if size != expected:
            raise UserError(f"--input: {path} holds {size} bytes, one image of the model is {expected} ({description})")


def load_sample(path: pathlib.Path, out: np.ndarray) -> None:
    """Read an input file into an array of the right shape and type.

    Raises:
      UserError: an .npy file of another type or shape.
    """
    if path.suffix.lower() == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.dtype != out.dtype:
            raise UserError(f"--input: {path} holds {array.dtype}, the model takes {out.dtype}")
        if array.size != out.size or (array.ndim > 1 and array.shape[-out.ndim :] != out.shape):
            found, taken = ("x".join(map(str, each.shape)) for each in (array, out))
            raise UserError(f"--input: {path} has shape {found}, the model takes {taken}")
        out[...] = array.reshape(out.shape)
        return
    with path.open("rb", buffering=0) as file:
        view = out.reshape(-1).view(np.uint8).data
        while view:
            count = file.readinto(view)
            if not count:
                raise UserError(f"--input: {path} became shorter while it was read")
            view = view[count:]


@contextlib.contextmanager
def output_folder(output: str, dirname: str) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """The results' folder of a run, which belongs to this process until the end of the block.

    ais_bench overwrites equal names and keeps other files, so a folder that is not empty would mix two runs.

    Returns:
      (folder, path of the summary): the summary lies beside the folder, or in it when `dirname` ends with a slash.
    Raises:
      UserError: the folder is not empty, belongs to another process, or cannot be created.
    """
    prefix = os.path.join(output, dirname or time.strftime("%Y_%m_%d-%H_%M_%S"))  # keeps the slash at the end
    folder, summary = pathlib.Path(prefix), pathlib.Path(prefix + "_summary.json")
    if os.path.isabs(dirname):
        raise UserError(f"--output-dirname: {dirname} is absolute; it is a name inside --output")
    if summary.exists():
        raise UserError(f"--output-dirname: {summary} is left from an earlier run; choose another name or remove it")
    make_folders(folder, "--output", 0o750)
    with claimed(folder, "--output-dirname"):
        if not is_empty(folder):
            raise UserError(f"--output-dirname: {folder} already holds files; choose another name or remove it")
        yield folder, summary


def write_result(folder: pathlib.Path, stem: str, outfmt: str, row: np.ndarray) -> pathlib.Path:
    """Write the logits of an image as {stem}_0.{bin,npy,txt}; TXT is one line of numbers with six decimals."""
    path = folder / f"{stem}_0.{outfmt.lower()}"
    if outfmt == "NPY":
        np.save(path, row[None])
    elif outfmt == "BIN":
        row.tofile(path)
    else:
        path.write_text("%f " * len(row) % tuple(row.tolist()) + "\n")
    return path


def statistics(milliseconds: Sequence[float]) -> dict[str, float]:
    """Statistics under the names of ais_bench's summary."""
    values = np.asarray(milliseconds)
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "percentile(99%)": float(np.percentile(values, 99)),
        "count": len(values),
    }


def write_summary(
    path: pathlib.Path, filesinfo: dict[str, Any], arguments: list[str], compute_ms: list[float], batch_size: int
) -> None:
    """Write the summary of a finished run; its throughput is in images per second of the network alone."""
    compute = statistics(compute_ms)
    content = {
        "filesinfo": filesinfo,
        "args": arguments,
        "NPU_compute_time": compute,
        "H2D_latency": statistics([0.0]),
        "D2H_latency": statistics([0.0]),
        "throughput": 1000 * batch_size / compute["mean"],
        "npu_compute_time_list": compute_ms,
        "pid": os.getpid(),
    }
    write_atomic(path, json.dumps(content))
