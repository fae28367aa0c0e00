"""OM files through InferSession, the Python interface of ais_bench."""

import ctypes
import importlib.util
import json
import math
import os
import pathlib
import sys
import tempfile
import typing
from collections.abc import Callable
from typing import Any

import numpy as np

from common import cli
from common.device import cann_failure
from common.device.cann_failure import INSTALL_AIS_BENCH
from common.errors import RunError, UserError

ITEM_TYPES = {1: "uint8", 2: "float16", 4: "float32"}  # bytes of a number -> type of images


class OmMetadata(typing.TypedDict, total=False):
    """What is known about an OM file; ais_bench itself checks only that the sizes of input files divide.

    Attributes:
      arch: network, where run_atc.py found it in the .onnx file.
      input: name of the input.
      batch: batch size, or "1,4,8" for dynamic batch sizes; absent where those are not known.
      largest_batch: of dynamic batch sizes, where the model was asked.
      shape, dtype: of one image: uint8 [H, W, 3] with AIPP; float32 or float16 [3, H, W]. Absent where not known.
      sample_bytes: of one image.
      soc_version: the chip it was built for.
      command: of atc, which built it.
      sources: [path, bytes, modification time in ns] of the files that it was built from.
      om_bytes: size of the OM file that this describes.
    """

    arch: str
    input: str
    batch: int | str
    largest_batch: int
    shape: list[int]
    dtype: str
    sample_bytes: int
    soc_version: str
    command: list[str]
    sources: list[list[str | int]]
    om_bytes: int


def record_path(om: pathlib.Path) -> pathlib.Path:
    """NAME.om -> NAME.om.json."""
    return pathlib.Path(f"{om}.json")


def read_record(om: pathlib.Path) -> OmMetadata:
    """What run_atc.py recorded; empty for a file of other origin, and where the record describes another file."""
    path = record_path(om)
    try:
        metadata: OmMetadata = json.loads(path.read_text())
        recorded = path.stat()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; remove it") from error
    found = om.stat()
    if recorded.st_mtime_ns < found.st_mtime_ns:
        reason = f"older than {om.name}"
    elif metadata.get("om_bytes", found.st_size) != found.st_size:
        reason = f"about a file of {metadata['om_bytes']} bytes, {om.name} has {found.st_size}"
    else:
        return metadata
    print(f"note: {path} is {reason}, so it describes another model and is ignored", flush=True)
    return {}


def require_ais_bench() -> None:
    """Raise UserError unless ais_bench is installed and is Huawei's package of that name."""
    package = importlib.util.find_spec("ais_bench")
    if package is None:
        raise UserError(f"ais_bench: not installed; {INSTALL_AIS_BENCH}")
    # find_spec("ais_bench.infer") would import the package, and fail where a library of it is missing.
    if not any(pathlib.Path(folder, "infer").is_dir() for folder in package.submodule_search_locations or ()):
        raise UserError(
            "ais_bench: the installed package of that name is another one (it evaluates language models); "
            f"remove it and {INSTALL_AIS_BENCH}"
        )


def open_session(model: pathlib.Path, device: int) -> Any:
    """An InferSession.

    Raises:
      UserError: ais_bench, aclruntime or a library of CANN is missing, there is no such device, or the file is damaged.
    """
    require_ais_bench()
    try:
        from ais_bench.infer.interface import InferSession
    except ImportError as error:
        reason = cann_failure.explain(str(error))
        raise UserError(f"ais_bench: installed, but it does not start: {reason}") from error
    try:
        # Versions since 2024 refuse links.
        return with_reason(lambda: InferSession(device, str(model.resolve())))
    except RunError as error:
        raise UserError(f"--model: {model} on device {device}: {error}") from error


Result = typing.TypeVar("Result")


def with_reason(call: Callable[[], Result]) -> Result:
    """Call a function of aclruntime, which prints the reason of its errors and raises little more than a number.

    Raises:
      RunError: what it printed, and a remedy.
    """
    flush_c_output = ctypes.CDLL(None).fflush
    with tempfile.TemporaryFile() as printed:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(printed.fileno(), 1)
        failure: Exception | None = None
        try:
            result = call()
        except Exception as error:  # noqa: BLE001  of any type, by version
            failure = error
        finally:
            sys.stdout.flush()
            flush_c_output(None)
            os.dup2(stdout, 1)
            os.close(stdout)
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    if failure is not None:
        raise RunError(cann_failure.explain(f"{output}\n{type(failure).__name__}: {failure}")) from failure
    print(output, end="", flush=True)
    return result


def describe(session: Any) -> OmMetadata:
    """What a session says about the input of its model."""
    image = session.get_inputs()[0]
    batch, *shape = (int(side) for side in image.shape)
    declared = getattr(getattr(image, "datatype", None), "name", "")
    found = OmMetadata(input=image.name)
    if batch > 0:
        found |= {"batch": batch, "sample_bytes": image.realsize // batch}
    elif declared and min(shape) > 0:  # dynamic batch sizes: the declared size is that of the largest
        sample_bytes = math.prod(shape) * np.dtype(declared).itemsize
        found |= {"largest_batch": image.size // sample_bytes, "sample_bytes": sample_bytes}
    if min(shape) > 0 and "sample_bytes" in found:
        item_bytes = found["sample_bytes"] / math.prod(shape)  # some versions declare the type before AIPP
        if not declared or np.dtype(declared).itemsize != item_bytes:
            declared = ITEM_TYPES.get(int(item_bytes), "") if item_bytes.is_integer() else ""
        if declared == "uint8" and shape[0] == 3:  # likewise the layout: AIPP takes HWC pixels
            shape = [*shape[1:], 3]
        found["shape"] = shape
        if declared:
            found["dtype"] = declared
    return found


def main(model: str, device: str, out: str) -> None:
    """Write to `out`, as JSON, what a model says about itself.

    For a process of its own: its end gives the device back, and a crash in CANN ends it alone.
    """
    with cli.exit_on_error():
        pathlib.Path(out).write_text(json.dumps(describe(open_session(pathlib.Path(model), int(device)))))
