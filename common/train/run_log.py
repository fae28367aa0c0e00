"""What a run says: lines on the terminal and in log.txt, numbers in metrics.jsonl and summary.json. Rank 0 only."""

import contextlib
import json
import pathlib
import sys
import time

import tqdm

from common.files import write_atomic
from common.run_folder import LOG, METRICS


class Report:
    """The voice of one run; a silent one (folder None) serves the other ranks.

    A model with another log format overrides the methods below `line`.
    """

    def __init__(self, folder):
        self.folder = folder and pathlib.Path(folder)
        self._bar, self._unwritable = None, set()

    def line(self, text=""):
        """One line of plain text to the terminal and log.txt."""
        if self.folder:
            try:
                with tqdm.tqdm.external_write_mode(file=sys.stdout, nolock=True):
                    print(text, flush=True)
            except BrokenPipeError:
                raise  # nobody reads any more, which ends a program
            except OSError:  # redirected to a file on a full disk; log.txt may have the line
                pass
            self._append(self.folder / LOG, text + "\n")

    def numbers(self, **values):
        """One record of metrics.jsonl, with the time in seconds since the epoch of Unix."""
        if self.folder:
            self._append(self.folder / METRICS, json.dumps(dict(time=round(time.time(), 3), **values)) + "\n")

    def _append(self, path, text):
        """Add to a file of the run; a full disk is no reason to end it, so that is said once and then borne."""
        try:
            with open(path, "a") as file:
                file.write(text)
        except OSError as error:
            if path not in self._unwritable:
                with contextlib.suppress(OSError):  # stderr may be a file on that disk
                    print(f"{path}: cannot be written ({error.strerror}); the run goes on", file=sys.stderr, flush=True)
            self._unwritable.add(path)
        else:
            self._unwritable.discard(path)

    def write(self, name, value):
        """A JSON file of the run folder."""
        if self.folder:
            write_atomic(self.folder / name, json.dumps(value, indent=2) + "\n")

    def epoch_begins(self, epoch, first_step, num_steps):
        """Start the progress bar of an epoch; only on a terminal."""
        if self.folder and sys.stdout.isatty():
            self._bar = tqdm.tqdm(
                total=num_steps, initial=first_step, desc=f"epoch {epoch + 1}", unit="step", leave=False
            )

    def step_done(self):
        if self._bar:
            self._bar.update()

    def progress(self, epoch, epochs, step, num_steps, loss, acc1, lr, fps, last_loss):
        """A progress line within an epoch; `loss` and `acc1` (percent) are means since the line before, `last_loss` is
        that of the last step alone."""
        self.line(
            f"epoch {epoch + 1}/{epochs} step {step}/{num_steps} "
            f"loss {loss:.4f} acc1 {acc1:.2f} lr {lr:.6g} fps {fps:.1f}"
        )

    def epoch_saved(self, checkpoint, epochs_done, num_steps):
        """The checkpoint at the end of an epoch of `num_steps` steps is on disk, validation included."""

    def epoch_done(self, epoch, epochs, counts, is_best):
        """The validation result of an epoch."""
        if self._bar:
            self._bar.close()
            self._bar = None
        if counts is not None:
            self.line(f"epoch {epoch + 1}/{epochs} {counts}{' best' if is_best else ''}")

    def final(self, fps, best_acc1, duration_s):
        """The last lines of a run; their wording is a contract with the people who read them by script."""
        self.line("------------------ Final result ------------------")
        self.line(f"Final Performance images/sec : {fps:.3f}")
        self.line(f"Final Train Accuracy : {best_acc1:.3f}")
        self.line(f"E2E Training Duration sec : {duration_s:.0f}")

    def close(self):
        if self._bar:
            self._bar.close()
