"""Checkpoints: written whole beside the training, verified on reading.

A file is written under a temporary name, flushed to the disk and renamed. Its integrity is inside: torch's zip format
carries a CRC-32 of every tensor.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import threading
import typing

import torch

from common import files
from common.errors import RunError, UserError
from common.run_folder import BEST, NEWEST, PREVIOUS
from common.weights.load import load_torch

# Further checkpoints that --keep-last and --keep-best ask for; the order of a run is in the names.
_KEPT_LAST = re.compile(r"checkpoint-(\d{8,})\.pth\.tar")
_KEPT_BEST = re.compile(r"model_best-(\d{4,})-(\d+\.\d{6})\.pth\.tar")


def on_host(value):
    """A copy of nested dicts and lists with all tensors on the CPU, strides kept."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [on_host(item) for item in value]
    return value


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A state of the run that no longer changes.

    Attributes:
      state: nested dicts and lists of host tensors and plain values.
      done_steps: optimizer steps since the start of the run.
      is_best: whether it is the best validated one so far.
      acc1: its validation top-1 in percent, where it was validated.
      then: called once the file is on the disk.
    """

    state: dict
    done_steps: int
    is_best: bool = False
    acc1: float | None = None
    then: typing.Callable | None = None


class Writer:
    """Writes the checkpoints of one run, in a thread, one at a time.

    Whenever the process dies, at least one whole checkpoint is in the folder. A file that cannot be written leaves
    those before it as they are.

    Args:
      folder: run folder.
      keep_last, keep_best: how many further checkpoints stay, the latest ones and those with the highest top-1.
      stop_on_error: whether a checkpoint that cannot be written ends the run, or is only reported.
      warn: called with one line for each checkpoint that could not be written.
    """

    def __init__(self, folder, keep_last=0, keep_best=0, stop_on_error=False, warn=print):
        self.folder, self._keep_last, self._keep_best = pathlib.Path(folder), keep_last, keep_best
        self._stop_on_error, self._warn = stop_on_error, warn
        self._thread, self._failure, self._unwritten_best = None, None, None
        self._newest_is_whole = False  # until this process wrote it or looked

    def save(self, snapshot):
        """Begin to write; waits only where the snapshot before is still being written."""
        self.wait()
        self._failure = None
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint writer")
        self._thread.start()

    def wait(self, timeout=None):
        """Wait for what is being written.

        Returns:
          a RunError that says why the last snapshot is not on the disk, or None.
        """
        if self._thread is not None:
            self._thread.join(timeout)
        return self._failure

    @property
    def fatal(self):
        """The RunError that must end the run, or None; does not wait."""
        return self._failure if self._stop_on_error else None

    def _run(self, snapshot):
        try:
            self._write(snapshot)
        except OSError as error:
            reason = (
                f"the checkpoint of step {snapshot.done_steps} cannot be written to {self.folder} "
                f"({error.strerror or error})"
            )
            self._failure = RunError(f"{reason}; the files before it are whole; make room, then --resume auto")
            if snapshot.is_best:
                self._unwritten_best = snapshot
            if not self._stop_on_error:
                self._warn(f"checkpoint: {reason}; the files before it are whole and the run goes on")

    def _write(self, snapshot):
        newest, best = self.folder / NEWEST, self.folder / BEST
        if self._unwritten_best is not None and not snapshot.is_best:
            # The state below says which epoch was the best one; its file has to be there first.
            with files.atomic_path(best) as draft:
                _save(self._unwritten_best.state, draft)
        with files.atomic_path(newest) as draft:
            _save(snapshot.state, draft)
            if snapshot.is_best:
                link(draft, best)
            self._unwritten_best = None
            if snapshot.acc1 is not None and self._keep_best:
                link(draft, self.folder / f"model_best-{snapshot.state['epoch']:04d}-{snapshot.acc1:.6f}.pth.tar")
            if self._keep_last:
                link(draft, self.folder / f"checkpoint-{snapshot.done_steps:08d}.pth.tar")
            # A damaged newest file, which a resumed run passed over, must not take the place of the one before it.
            if self._newest_is_whole or (newest.exists() and _verifies(newest)):
                _move_aside(newest, self.folder / PREVIOUS)
        self._newest_is_whole = True
        files.sync_folder(self.folder)
        self._forget()
        if snapshot.then:
            snapshot.then()

    def _forget(self):
        """Remove kept files beyond the numbers asked for; what the folder holds decides, so a resumed run goes on."""
        if self._keep_last:
            _remove(kept_last(self.folder)[self._keep_last :])
        if self._keep_best:
            _remove(kept_best(self.folder)[self._keep_best :])


def kept_best(folder):
    """Checkpoints that --keep-best kept in a folder, the highest top-1 first; of equal ones the earlier epoch."""
    found = [(m, path) for path in pathlib.Path(folder).iterdir() if (m := _KEPT_BEST.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda item: (-float(item[0][2]), int(item[0][1])))]


def kept_last(folder):
    """Checkpoints that --keep-last kept in a folder, the latest first."""
    found = [(int(m[1]), path) for path in pathlib.Path(folder).iterdir() if (m := _KEPT_LAST.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _save(state, path):
    """torch.save, and on the disk when this returns."""
    with open(path, "wb") as file:  # torch reports a full disk as a RuntimeError where it opens the file itself
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def link(source, target):
    """Make `target` the same file as `source`, by a hard link where the file system has them."""
    with files.atomic_path(target) as draft:
        draft.unlink(missing_ok=True)
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


def _move_aside(newest, previous):
    """Keep the newest file as the one before it; where hard links exist, there is a newest one at every moment."""
    try:
        with files.atomic_path(previous) as draft:
            draft.unlink(missing_ok=True)
            os.link(newest, draft)
    except OSError:
        os.replace(newest, previous)


def _remove(paths):
    for path in paths:
        path.unlink(missing_ok=True)


def _verifies(path):
    """Whether a file can be resumed from."""
    try:
        load_torch(path)
    except UserError:
        return False
    return True


def newest_valid(folder, say=print):
    """(path, state) of the newest checkpoint in `folder` that verifies, or None; damaged files are reported to `say`.

    Raises:
      UserError: there are checkpoints and none of them verifies.
    """
    found = [path for name in (NEWEST, PREVIOUS) if (path := pathlib.Path(folder) / name).exists()]
    found += kept_last(folder)
    for path in found:
        try:
            return path, load_torch(path)
        except UserError as error:
            say(f"resume: {error}")
    if found:
        raise UserError(f"--resume: no checkpoint in {folder} can be read; remove them to start again")
    return None
