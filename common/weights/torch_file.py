"""Files of torch.save, read without running code; what other programs write is named, with the way to its weights."""

import argparse
import mmap
import pathlib
import pickle
import re
import warnings
import zipfile
from typing import Any

from common.errors import UserError, printable
from common.files import StrPath

# torch.save before version 1.6 wrote a pickle of its magic number first.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_RESAVE = "load it in the program that wrote it, and torch.save its state_dict() alone"

# What zipfile and torch.load raise for damaged files (4,000 random changes of old and new ones gave nothing else).
_TORCH_RAISES = (
    zipfile.BadZipFile,
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    OSError,
    AttributeError,
    AssertionError,
)


def load_torch(path: StrPath) -> Any:
    """torch.load of tensors, plain containers, argparse.Namespace and numbers of numpy; CRCs are checked first.

    Raises:
      UserError: truncated, damaged, or holding anything else.
    """
    import torch

    try:
        first_bytes = head(path)
        if not first_bytes.startswith((b"PK", b"\x80")):
            raise unknown_format(path, first_bytes)
        if first_bytes.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                _refuse_foreign_archive(path, archive)
                broken = archive.testzip()
            if broken:
                raise UserError(f"{path}: damaged, the checksum of {broken} is wrong; copy or download it again")
        elif not first_bytes[2:].startswith(_LEGACY_MAGIC):
            raise UserError(f"{path}: a pickle that torch.save did not write; {_RESAVE}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(_data_types()):
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error below says what matters
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unreadable_pickle(path, error) from error
    except UserError:
        raise
    except _TORCH_RAISES as error:
        raise damaged(path, error) from error


def head(path: StrPath) -> bytes:
    """The first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(24)


def holds_keras(path: StrPath) -> bool:
    """Whether a zip archive is a `.keras` file of Keras 3."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"config.json", "model.weights.h5"} <= set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False  # truncated; the reader of torch.save's files says so


def first_line(error: Exception) -> str:
    """The first line of an error's text, without control characters."""
    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    return printable(line)[:160]


def damaged(path: StrPath, error: Exception) -> UserError:
    return UserError(f"{path}: truncated or damaged ({first_line(error)}); copy or download it again")


def unknown_format(path: StrPath, first_bytes: bytes) -> UserError:
    """The error for a file that no reader takes."""
    return refused(path, first_bytes) or UserError(
        f"{path}: not a checkpoint format known here; expected .pth, .pth.tar, .pt, .safetensors, "
        "MindSpore's .ckpt or Keras' .h5"
    )


def refused(path: StrPath, first_bytes: bytes) -> UserError | None:
    """The error for a file that is no checkpoint, where its first bytes or its name tell what it is."""
    known = {
        b"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull",
        b"<": "a web page or XML; the download failed, download it again",
        b"\x1f\x8b": "compressed with gzip; unpack it first",
        b"\xfd7zXZ": "compressed with xz; unpack it first",
        b"BZh": "compressed with bzip2; unpack it first",
    }
    for start, what in known.items():
        if first_bytes.startswith(start):
            return UserError(f"{path}: {what}")
    if not first_bytes:
        return UserError(f"{path}: empty, not a checkpoint; copy or download it again")
    if pathlib.Path(path).suffix in (".onnx", ".om"):
        return UserError(f"{path}: an exported model, which has no weights to load; give the checkpoint it came from")
    return None


class _Numpy:
    """Stands for numpy.dtype and numpy.ndarray and keeps their arguments: numpy's own code reads no foreign data."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _numpy_scalar(dtype: _Numpy, data: bytes) -> int | float | complex | bool | None:
    """Value of a pickled numpy scalar; None for one that is not a number."""
    import numpy as np

    code, order = str(dtype.arguments[0]), str(dtype.state[1]) if len(dtype.state) > 1 else "="
    if not re.fullmatch(r"[biufc]\d{1,2}", code) or order not in "<>=|":
        return None
    return np.frombuffer(data, order.replace("|", "=") + code, count=1).item()


def _data_types() -> list[Any]:
    """What weights_only may construct besides its own list.

    timm and torchvision store their options as an argparse.Namespace. numpy scalars and arrays are frequent among
    metrics and states of generators; numpy 1 and 2 spell their module differently.
    """
    named: list[Any] = [(_Numpy, "numpy.dtype"), (_Numpy, "numpy.ndarray")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named += [(_numpy_scalar, f"{module}.scalar"), (_Numpy, f"{module}._reconstruct")]
    return [argparse.Namespace, *named]


def _refuse_foreign_archive(path: StrPath, archive: zipfile.ZipFile) -> None:
    """UserError for a zip archive that torch.save did not write."""
    names = archive.namelist()
    members = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in members:
        raise UserError(
            f'{path}: a TorchScript module, not a state dict; save its weights with python -c "import torch; '
            f"torch.save(torch.jit.load('{path}', 'cpu').state_dict(), 'weights.pth')\""
        )
    if "model.weights.h5" in members:
        raise UserError(f"{path}: a .keras archive, not a file of torch.save; tools/convert_weights.py reads it")
    if "archive_format" in members:
        raise UserError(
            f'{path}: an exported program of torch.export, not a state dict; save its weights with python -c "import '
            f"torch; torch.save(torch.export.load('{path}').state_dict, 'weights.pth')\""
        )
    if members and all(name.endswith(".npy") for name in members):
        raise UserError(f"{path}: numpy arrays (.npz), not a file of torch.save; {_RESAVE}")
    if "data.pkl" not in members:
        shown = ", ".join(printable(name) for name in names[:3]) or "nothing"
        raise UserError(f"{path}: a zip archive that torch.save did not write (it holds {shown})")


def _unreadable_pickle(path: StrPath, error: Exception) -> UserError:
    """The error for a pickle that weights_only refuses: names the class of the first object that it may not build."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is None:
        reason = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))
        shown = printable(reason[1])[:160] if reason else first_line(error)
        return UserError(f"{path}: damaged, or more than a state dict ({shown}); {_RESAVE}")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        holds_module = content.find(b"ctorch.nn.modules.") >= 0
    name = printable(named[1])
    if holds_module:
        return UserError(
            f"{path}: a whole pickled network ({name}), not a state dict; where its code is installed and the file is "
            f"trusted, model = torch.load('{path}', weights_only=False) (or an entry of it, where that is a dict) and "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    return UserError(f"{path}: holds a {name}, which only its own program can load; {_RESAVE}")
