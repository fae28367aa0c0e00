"""What a run of Xception prints and keeps: the seed's lines, log files and checkpoint names."""

import os
import pathlib
import re
import time

import numpy as np

from common.errors import UserError
from common.train.run_log import Report
from xception.src import lr_generator

NAME = re.compile(r"(Xception-rank0(?:_\d+)?)-(\d+)_(\d+)\.ckpt")
LOGS = {"Ascend": "log.txt", "GPU": "log_gpu.txt"}
EVAL_LOGS = {"Ascend": "eval.log", "GPU": "eval_gpu.log"}


def checkpoint_folder(config):
    """Where the named checkpoints of a recipe go: ./ckpt_0 or ./gpu-ckpt."""
    folder = pathlib.Path(config.save_checkpoint_path)
    return folder / "ckpt_0" if config.recipe == "Ascend" else folder


def result_line(counts):
    """The seed's result of an evaluation; accuracies are fractions."""
    hits = {f"Top_{k}_Acc": int(counts.correct[k - 1]) / counts.seen for k in (1, 5)}
    return f"result: { ({'Loss': counts.loss} | hits) }"


class XceptionReport(Report):
    """The voice of one run; its lines also go to log.txt or log_gpu.txt in the caller's folder."""

    def __init__(self, folder, job):
        super().__init__(folder)
        self.config, self.resumed = job.config, job.state is not None
        self._seed_log = pathlib.Path.cwd() / LOGS[job.config.recipe]
        self._prefix, self._kept = None, []
        lr_generator.mode(self.config.lr_schedule, self.line)
        if self.config.is_distributed and "WORLD_SIZE" not in os.environ:
            self.line("is_distributed: one process was started; scripts/run_distribute_train.sh starts several")

    def line(self, text=""):
        """To the terminal, the run's log.txt and the seed's."""
        super().line(text)
        if self.folder:
            self._append(self._seed_log, text + "\n")

    def epoch_begins(self, epoch, first_step, num_steps):
        super().epoch_begins(epoch, first_step, num_steps)
        self._first_step, self._since = first_step, time.perf_counter()

    def progress(self, epoch, epochs, step, num_steps, loss, acc1, lr, fps, last_loss):
        """The loss of the step it names, as float32 prints; the time of the epoch where it ends."""
        self.line(f"epoch: {epoch + 1} step: {step}, loss is {np.float32(last_loss)!s}")
        if step == num_steps:
            ms, steps = 1000 * (time.perf_counter() - self._since), step - self._first_step
            self.line(f"epoch time: {ms:.3f} ms, per step time: {ms / steps:.3f} ms")

    def epoch_done(self, epoch, epochs, counts, is_best):
        super().epoch_done(epoch, epochs, None, is_best)
        if counts is not None:
            self.line(result_line(counts))

    def epoch_saved(self, checkpoint, epochs_done, num_steps):
        """Keep the checkpoint as Xception-rank0-EPOCH_STEP.ckpt, and only the last keep_checkpoint_max of this run."""
        config = self.config
        if not self.folder or not config.save_checkpoint or epochs_done % config.save_checkpoint_epochs:
            return
        from common.train import checkpoint as checkpoints

        folder = checkpoint_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        if self._prefix is None:
            self._prefix = _prefix(folder, config.resume, self.resumed)
            self._kept = [path for path in _named(folder) if NAME.fullmatch(path.name)[1] == self._prefix]
        target = folder / f"{self._prefix}-{epochs_done}_{num_steps}.ckpt"
        checkpoints.link(checkpoint, target)
        self._kept = [path for path in self._kept if path != target] + [target]
        while len(self._kept) > config.keep_checkpoint_max:
            self._kept.pop(0).unlink(missing_ok=True)

    def final(self, fps, best_acc1, duration_s):
        """The end of a run."""
        self.line("train success")


def _prefix(folder, resume, resumed):
    """Xception-rank0, or as in MindSpore with _1, _2 ... where another run's files are; a resumed run keeps its own."""
    named = NAME.fullmatch(pathlib.Path(resume).name) if resumed else None
    if named:
        return named[1]
    used = {NAME.fullmatch(path.name)[1] for path in _named(folder)}
    newest = max(used, key=_number, default="Xception-rank0")
    return newest if resumed or not used else f"Xception-rank0_{_number(newest) + 1}"


def _number(prefix):
    return int(prefix.rpartition("_")[2]) if "_" in prefix else 0


def _named(folder):
    """The named checkpoints in a folder, run by run, the earliest epoch first."""

    def place(path):
        prefix, epoch, step = NAME.fullmatch(path.name).groups()
        return _number(prefix), int(epoch), int(step)

    return sorted((path for path in pathlib.Path(folder).glob("*.ckpt") if NAME.fullmatch(path.name)), key=place)


def newest_checkpoint():
    """Path of the newest named checkpoint in ./ckpt_0 or ./gpu-ckpt.

    Raises:
      UserError: there is none.
    """
    found = [path for folder in ("ckpt_0", "gpu-ckpt") for path in _named(folder)]
    if not found:
        raise UserError("no Xception-rank0-EPOCH_STEP.ckpt in ./ckpt_0 or ./gpu-ckpt; name a checkpoint file")
    return max(found, key=lambda path: path.stat().st_mtime)
