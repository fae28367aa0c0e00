"""Checkpoints and run folders: written whole, verified on reading, never overwritten by a new run.

A file is written under a temporary name, flushed to the disk and renamed. Its integrity is inside: torch's zip format
carries a CRC-32 of every tensor.
"""

import contextlib
import os
import pathlib
import shutil

import torch

from common import weights
from common.errors import UserError
from common.train import report

NEWEST, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint.prev.pth.tar", "model_best.pth.tar"


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
            _link(temporary, folder / BEST)
        if newest.exists():
            os.replace(newest, folder / PREVIOUS)
        os.replace(temporary, newest)
        _sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _link(source, target):
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


def holds_run(folder):
    """Whether a folder already contains something of a run."""
    names = (report.CONFIG, report.LOG, report.METRICS, report.SUMMARY, NEWEST, PREVIOUS, BEST)
    return any((pathlib.Path(folder) / name).exists() for name in names)


def numbered_runs(parent):
    """Run folders below `parent` (./output/<name>), oldest first."""
    parent = pathlib.Path(parent)
    return (
        sorted((p for p in parent.glob("[0-9]*") if p.name.isdigit()), key=lambda p: int(p.name))
        if parent.is_dir()
        else []
    )


def new_run(parent):
    """Create the next numbered folder below `parent`; numbers are never used twice, also by two runs at once."""
    number = int(runs[-1].name) + 1 if (runs := numbered_runs(parent)) else 0
    pathlib.Path(parent).mkdir(parents=True, exist_ok=True)
    while True:
        folder = pathlib.Path(parent) / f"{number:05d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1
