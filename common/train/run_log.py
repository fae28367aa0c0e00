"""RunLogger: lines on the terminal and in log.txt, records in metrics.jsonl, JSON files. Rank 0 only."""

import contextlib
import json
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

import tqdm

from common.errors import discard_output, print_error
from common.evaluation.metrics import Counts
from common.files import write_atomic
from common.run_folder import LOG, METRICS
from common.train.event_files import EventFiles

if TYPE_CHECKING:
    from common.train.meters import TimeLeft, TrainMetrics


class RunLogger:
    """Logger of one run; with `folder` None (ranks other than 0) every method does nothing.

    A model with another log format overrides the methods below `write_json`.

    Attributes:
      events: of --tensorboard, where it is given.
      output_is_closed: whether nobody reads standard output any more (`| head`).
    """

    def __init__(self, folder: pathlib.Path | None) -> None:
        self.folder = folder and pathlib.Path(folder)
        self.events: EventFiles | None = None
        self.output_is_closed = False
        self._bar: tqdm.tqdm | None = None
        self._unwritable: set[pathlib.Path] = set()

    def info(self, text: str = "") -> None:
        """Print a line and append it to log.txt."""
        if self.folder:
            try:
                with tqdm.tqdm.external_write_mode(file=sys.stdout, nolock=True):
                    print(text, flush=True)
            except BrokenPipeError:
                discard_output()
                self.output_is_closed = True
                text += "\nstandard output was closed: the run saves and ends"
            except OSError:  # a terminal that was closed, or a full disk; log.txt may be on another one
                pass
            self._append(self.folder / LOG, text + "\n")

    def metrics(self, **values: Any) -> None:
        """Append a record to metrics.jsonl, with the time in seconds since the Unix epoch."""
        if self.folder:
            self._append(self.folder / METRICS, json.dumps(dict(time=round(time.time(), 3), **values)) + "\n")
            if self.events is not None:
                self.events.add(values)

    def _append(self, path: pathlib.Path, text: str) -> None:
        """Append to a file of the run. A failure (full disk) is reported once, then ignored: the run continues."""
        try:
            with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
        except OSError as error:
            if path not in self._unwritable:
                print_error(f"{path}: cannot be written ({error.strerror}); the run goes on")
            self._unwritable.add(path)
        else:
            self._unwritable.discard(path)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run folder."""
        if self.folder:
            write_atomic(self.folder / name, json.dumps(value, indent=2) + "\n")

    def epoch_started(self, epoch: int, first_step: int, num_steps: int) -> None:
        """Start the progress bar of an epoch, on a terminal."""
        if self.folder and sys.stdout.isatty():
            self._bar = tqdm.tqdm(
                total=num_steps, initial=first_step, desc=f"epoch {epoch + 1}", unit="step", leave=False
            )

    def step_done(self) -> None:
        if self._bar:
            with contextlib.suppress(OSError):  # the terminal was closed
                self._bar.update()

    def progress(
        self, epoch: int, epochs: int, step: int, num_steps: int, means: "TrainMetrics", fps: float, left: "TimeLeft"
    ) -> None:
        """Log the progress within an epoch; `epoch` is counted from 0, `step` is the number of steps done in it."""
        self.info(
            f"epoch {epoch + 1}/{epochs} step {step}/{num_steps} "
            f"loss {means.loss:.4f} acc1 {means.acc1:.2f} lr {means.lr:.6g} fps {fps:.1f} left {left}"
        )

    def validated(self, epoch: int, epochs: int, counts: Counts | None, is_best: bool) -> None:
        """Log the validation result of an epoch; `counts` is None without a validation set."""
        self.remove_bar()
        if counts is not None:
            self.info(f"epoch {epoch + 1}/{epochs} {counts}{' best' if is_best else ''}")

    def epoch_saved(self, checkpoint: pathlib.Path, epochs_done: int, num_steps: int) -> None:
        """The checkpoint at the end of an epoch of `num_steps` steps, validation included, is on disk."""

    def final_result(self, fps: float, best_acc1: float, duration_s: float) -> None:
        """Log the last lines of a run. Scripts parse them: their wording is fixed."""
        self.info("------------------ Final result ------------------")
        self.info(f"Final Performance images/sec : {fps:.3f}")
        self.info(f"Final Train Accuracy : {best_acc1:.3f}")
        self.info(f"E2E Training Duration sec : {duration_s:.0f}")

    def close(self) -> None:
        """End the output: what standard output did not take is in log.txt."""
        self.remove_bar()
        if self.events is not None:
            self.events.close()
        try:
            sys.stdout.flush()
        except OSError:
            discard_output()

    def remove_bar(self) -> None:
        """Remove the progress bar."""
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None
