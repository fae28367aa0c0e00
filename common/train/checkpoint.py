"""Checkpoints: written whole, verified on reading.

A file is written under a temporary name, flushed to the disk and renamed. Its integrity is inside: torch's zip format
carries a CRC-32 of every tensor.
"""

import os
import pathlib
import shutil

import torch

from common import weights
from common.errors import UserError
from common.train.runs import BEST, NEWEST, PREVIOUS


def on_host(value):
    """A copy of nested dicts and lists with all tensors on the CPU, strides kept."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [on_host(item) for item in value]
    return value


def save(state, folder, is_best=False):
    """Write the newest checkpoint of a run; the one before it stays as checkpoint.prev, a best one as model_best.

    Whenever the process dies, at least one whole checkpoint is in the folder.

    Args:
      state: nested dicts and lists of host tensors and plain values.
      folder: run folder.
      is_best: also keep it as model_best.pth.tar.
    """
    folder = pathlib.Path(folder)
    newest, temporary = folder / NEWEST, folder / (NEWEST + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if is_best:
            link(temporary, folder / BEST)
        if newest.exists():
            os.replace(newest, folder / PREVIOUS)
        os.replace(temporary, newest)
        _sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)


def link(source, target):
    """Make `target` the same file as `source`, by a hard link where the file system has them."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_valid(folder, say=print):
    """(path, state) of the newest checkpoint in `folder` that verifies, or None; damaged files are reported to `say`.

    Raises:
      UserError: there are checkpoints and none of them verifies.
    """
    found = [path for name in (NEWEST, PREVIOUS) if (path := pathlib.Path(folder) / name).exists()]
    for path in found:
        try:
            return path, weights.load_torch(path)
        except UserError as error:
            say(f"resume: {error}")
    if found:
        raise UserError(f"--resume: no checkpoint in {folder} can be read; remove them to start again")
    return None
