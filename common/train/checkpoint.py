"""Checkpoints: written atomically in a thread beside the training, verified when they are read.

A file is written under a temporary name, flushed to disk and renamed. torch's zip format holds a CRC-32 of every
tensor, so a file can be verified by itself.
"""

import dataclasses
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from common import files
from common.errors import RunError, UserError
from common.run_folder import BEST, NEWEST, PREVIOUS
from common.weights.load import load_torch

# Further checkpoints that --keep-last and --keep-best ask for; their names hold steps, or epoch and top-1.
_KEPT_LAST = re.compile(r"checkpoint-(\d{8,})\.pth\.tar")
_KEPT_BEST = re.compile(r"model_best-(\d{4,})-(\d+\.\d{6})\.pth\.tar")


def on_host(value: Any) -> Any:
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
    """A copy of the state of the run.

    Attributes:
      state: nested dicts and lists of host tensors and plain values.
      done_steps: optimizer steps since the start of the run.
      is_best: whether it has the highest validation top-1 so far.
      acc1: its validation top-1 in percent, where it was validated.
      then: called once the file is on disk.
    """

    state: dict[str, Any]
    done_steps: int
    is_best: bool = False
    acc1: float | None = None
    then: Callable[[], None] | None = None


class Writer:
    """Writes the checkpoints of one run in a thread, one at a time.

    If the process is killed at any moment, the folder holds at least one complete checkpoint. A checkpoint that cannot
    be written leaves earlier files unchanged.

    Args:
      folder: run folder.
      keep_last, keep_best: how many further checkpoints stay, the latest ones and those with the highest top-1.
      stop_on_error: whether a checkpoint that cannot be written ends the run, or is only reported.
      warn: called with one line for each checkpoint that could not be written.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        keep_last: int = 0,
        keep_best: int = 0,
        stop_on_error: bool = False,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder, self._keep_last, self._keep_best = pathlib.Path(folder), keep_last, keep_best
        self._stop_on_error, self._warn = stop_on_error, warn
        self._thread: threading.Thread | None = None
        self._failure: RunError | None = None
        self._unwritten_best: Snapshot | None = None
        self._newest_is_verified = False  # this process wrote the newest file, or has read it

    def save(self, snapshot: Snapshot) -> None:
        """Start writing; waits only while the previous snapshot is still being written."""
        self.wait()
        self._failure = None
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint writer")
        self._thread.start()

    def wait(self, timeout: float | None = None) -> RunError | None:
        """Wait for the snapshot that is being written.

        Returns:
          the reason why the last snapshot is not on disk, or None.
        """
        if self._thread is not None:
            self._thread.join(timeout)
        return self._failure

    @property
    def fatal(self) -> RunError | None:
        """The error that must end the run; does not wait."""
        return self._failure if self._stop_on_error else None

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except OSError as error:
            reason = (
                f"the checkpoint of step {snapshot.done_steps} cannot be written to {self.folder} "
                f"({error.strerror or error})"
            )
            remedy = "the files before it are whole; make room, then --resume auto"
            self._failure = RunError(f"{reason}; {remedy}", is_final=True)
            if snapshot.is_best:
                self._unwritten_best = snapshot
            if not self._stop_on_error:
                self._warn(f"checkpoint: {reason}; the files before it are whole and the run goes on")

    def _write(self, snapshot: Snapshot) -> None:
        newest, best = self.folder / NEWEST, self.folder / BEST
        if self._unwritten_best is not None and not snapshot.is_best:
            # The state below names the best epoch; that epoch's file has to exist first.
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
            # A damaged newest file, which a resumed run skipped, must not replace the previous one.
            if self._newest_is_verified or (newest.exists() and _verifies(newest)):
                _keep_as_previous(newest, self.folder / PREVIOUS)
        self._newest_is_verified = True
        files.sync_folder(self.folder)
        self._remove_old()
        if snapshot.then:
            snapshot.then()

    def _remove_old(self) -> None:
        """Remove kept files beyond the requested numbers, including those of the run before a resume."""
        if self._keep_last:
            _remove(kept_last(self.folder)[self._keep_last :])
        if self._keep_best:
            _remove(kept_best(self.folder)[self._keep_best :])


def kept_best(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints that --keep-best kept in a folder, the highest top-1 first; of equal ones the earlier epoch."""
    found = [(m, path) for path in pathlib.Path(folder).iterdir() if (m := _KEPT_BEST.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda item: (-float(item[0][2]), int(item[0][1])))]


def kept_last(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints that --keep-last kept in a folder, the latest first."""
    found = [(int(m[1]), path) for path in pathlib.Path(folder).iterdir() if (m := _KEPT_LAST.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _save(state: dict[str, Any], path: pathlib.Path) -> None:
    """torch.save, flushed to disk."""
    with open(path, "wb") as file:  # torch reports a full disk as a RuntimeError where it opens the file itself
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def link(source: pathlib.Path, target: pathlib.Path) -> None:
    """Make `target` the same file as `source` atomically: a hard link, or a copy where the file system has none."""
    with files.atomic_path(target) as draft:
        draft.unlink(missing_ok=True)
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


def _keep_as_previous(newest: pathlib.Path, previous: pathlib.Path) -> None:
    """Name the newest file `previous` too; with hard links, `newest` exists at every moment."""
    try:
        with files.atomic_path(previous) as draft:
            draft.unlink(missing_ok=True)
            os.link(newest, draft)
    except OSError:
        os.replace(newest, previous)


def _remove(paths: Iterable[pathlib.Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _verifies(path: pathlib.Path) -> bool:
    """Whether a file can be read."""
    try:
        load_torch(path)
    except UserError:
        return False
    return True


def newest_valid(
    folder: str | pathlib.Path, log: Callable[[str], None] = print
) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """(path, state) of the newest checkpoint in `folder` that verifies, or None; damaged files are passed to `log`.

    Raises:
      UserError: there are checkpoints and none of them verifies.
    """
    found = [path for name in (NEWEST, PREVIOUS) if (path := pathlib.Path(folder) / name).exists()]
    found += kept_last(folder)
    for path in found:
        try:
            return path, load_torch(path)
        except UserError as error:
            log(f"resume: {error}")
    if found:
        raise UserError(f"--resume: no checkpoint in {folder} can be read; remove them to start again")
    return None
