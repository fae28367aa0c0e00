"""Log lines, log files and checkpoint names of the MindSpore package."""

import contextlib
import json
import os
import pathlib
import re
import time
from typing import IO, TYPE_CHECKING

import numpy as np

from common import files, run_folder
from common.errors import UserError
from common.evaluation.metrics import Counts
from common.train.run_log import RunLogger
from common.train.run_setup import RunSetup
from xception.src import lr_generator
from xception.src.config import XceptionConfig

if TYPE_CHECKING:
    from common.train.meters import TimeLeft, TrainMetrics

NAME = re.compile(r"(Xception-rank0(?:_\d+)?)-(\d+)_(\d+)\.ckpt")
PREFIX = "ckpt_prefix.json"  # in a run folder: folder of the named checkpoints -> prefix of those of this run
LOGS = {"Ascend": "log.txt", "GPU": "log_gpu.txt"}
EVAL_LOGS = {"Ascend": "eval.log", "GPU": "eval_gpu.log"}


def checkpoint_folder(config: XceptionConfig) -> pathlib.Path:
    """Folder of the named checkpoints of a recipe: ./ckpt_0 or ./gpu-ckpt."""
    folder = pathlib.Path(config.save_checkpoint_path)
    return folder / "ckpt_0" if config.recipe == "Ascend" else folder


def result_line(counts: Counts) -> str:
    """The result of an evaluation; accuracies are fractions."""
    hits = {f"Top_{k}_Acc": int(counts.correct[k - 1]) / counts.seen for k in (1, 5)}
    return f"result: { ({'Loss': counts.loss} | hits) }"


class XceptionLogger(RunLogger):
    """RunLogger whose lines also go to log.txt or log_gpu.txt in the current folder."""

    def __init__(self, folder: pathlib.Path | None, setup: RunSetup) -> None:
        super().__init__(folder)
        assert isinstance(setup.config, XceptionConfig)
        self.config, self.resumed = setup.config, setup.state is not None
        self._log = pathlib.Path.cwd() / LOGS["Ascend" if self.config.recipe == "Ascend" else "GPU"]
        self._lock = self._locked_log() if self.folder else None
        self._prefix: str | None = None
        self._kept: list[pathlib.Path] = []
        lr_generator.mode(self.config.lr_schedule, self.info)
        if self.config.is_distributed and "WORLD_SIZE" not in os.environ:
            self.info("is_distributed: one process was started; scripts/run_distribute_train.sh starts several")

    def _locked_log(self) -> IO[str] | None:
        """The log file in the current folder with this run's lock, or None and a note where another run has it."""
        with contextlib.suppress(OSError):  # reported when it is written to
            file = open(self._log, "a")  # noqa: SIM115  closed by `close`
            if files.lock(file):
                return file
            file.close()
            self.info(
                f"note: another run writes {self._log} too, so lines of both are in it; {self.folder}/{run_folder.LOG} "
                "has those of this run alone"
            )
        return None

    def info(self, text: str = "") -> None:
        super().info(text)
        if self.folder:
            self._append(self._log, text + "\n")

    def epoch_started(self, epoch: int, first_step: int, num_steps: int) -> None:
        super().epoch_started(epoch, first_step, num_steps)
        self._first_step, self._epoch_started = first_step, time.perf_counter()

    def progress(
        self, epoch: int, epochs: int, step: int, num_steps: int, means: "TrainMetrics", fps: float, left: "TimeLeft"
    ) -> None:
        """The loss of this step alone, printed as a float32; at the end of the epoch its time; then the time left."""
        self.info(f"epoch: {epoch + 1} step: {step}, loss is {np.float32(means.last_loss)!s}")
        if step == num_steps:
            ms, steps = 1000 * (time.perf_counter() - self._epoch_started), step - self._first_step
            self.info(f"epoch time: {ms:.3f} ms, per step time: {ms / steps:.3f} ms")
        self.info(f"time left: {left}")

    def validated(self, epoch: int, epochs: int, counts: Counts | None, is_best: bool) -> None:
        self.remove_bar()
        if counts is not None:
            self.info(result_line(counts))

    def epoch_saved(self, checkpoint: pathlib.Path, epochs_done: int, num_steps: int) -> None:
        """Keep the checkpoint as Xception-rank0-EPOCH_STEP.ckpt, and only the last keep_checkpoint_max of this run."""
        config = self.config
        if not self.folder or not config.save_checkpoint or epochs_done % config.save_checkpoint_epochs:
            return
        from common.train import checkpoint as checkpoints

        folder = checkpoint_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        if self._prefix is None:
            self._prefix = self._own_prefix(folder, f"{epochs_done}_{num_steps}.ckpt")
            self._kept = [path for path in _named(folder) if _parts(path)[0] == self._prefix]
        target = folder / f"{self._prefix}-{epochs_done}_{num_steps}.ckpt"
        checkpoints.link(checkpoint, target)
        self._kept = [path for path in self._kept if path != target] + [target]
        while len(self._kept) > config.keep_checkpoint_max:
            self._kept.pop(0).unlink(missing_ok=True)

    def _own_prefix(self, folder: pathlib.Path, end: str) -> str:
        """The prefix of this run's files in `folder`: that of the file it resumes, of its earlier part, or a new one.

        Args:
          end: of the name of the file to write.
        """
        assert self.folder is not None
        record, place = pathlib.Path(self.folder) / PREFIX, str(folder.absolute())
        named = NAME.fullmatch(pathlib.Path(self.config.resume).name) if self.resumed else None
        prefix = named[1] if named else ""
        if self.resumed and not prefix:
            with contextlib.suppress(OSError, ValueError):
                prefix = json.loads(record.read_text()).get(place, "")
        while not prefix:
            prefix = _new_prefix(folder)
            try:  # of runs that come here at once, each gets its own
                (folder / f"{prefix}-{end}").touch(exist_ok=False)
            except FileExistsError:
                prefix = ""
        files.write_atomic(record, json.dumps({place: prefix}) + "\n")
        return prefix

    def close(self) -> None:
        super().close()
        if self._lock is not None:
            self._lock.close()

    def final_result(self, fps: float, best_acc1: float, duration_s: float) -> None:
        self.info("train success")


def _new_prefix(folder: pathlib.Path) -> str:
    """Xception-rank0, or as in MindSpore with _1, _2 ... where another run's files are."""
    used = {_number(_parts(path)[0]) for path in _named(folder)}
    return f"Xception-rank0_{max(used) + 1}" if used else "Xception-rank0"


def _number(prefix: str) -> int:
    return int(prefix.rpartition("_")[2]) if "_" in prefix else 0


def _parts(path: pathlib.Path) -> tuple[str, int, int]:
    """(prefix, epoch, step) of a named checkpoint."""
    match = NAME.fullmatch(path.name)
    assert match is not None
    return match[1], int(match[2]), int(match[3])


def _named(folder: pathlib.Path | str) -> list[pathlib.Path]:
    """The named checkpoints in a folder, by run, then by epoch and step."""
    found = (path for path in pathlib.Path(folder).glob("*.ckpt") if NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: (_number(_parts(path)[0]), *_parts(path)[1:]))


def newest_checkpoint() -> pathlib.Path:
    """Path of the newest named checkpoint in ./ckpt_0 or ./gpu-ckpt, else of the newest run's best one.

    Raises:
      UserError: there is none.
    """
    found = [path for folder in ("ckpt_0", "gpu-ckpt") for path in _named(folder)]
    if not found:
        try:
            return run_folder.newest_best("xception")  # a run that was stopped in its first epoch has no other
        except UserError as error:
            message = "no Xception-rank0-EPOCH_STEP.ckpt in ./ckpt_0 or ./gpu-ckpt; name a checkpoint file"
            raise UserError(message) from error
    return max(found, key=lambda path: path.stat().st_mtime)
