"""--tensorboard: the records of metrics.jsonl as TensorBoard event files, one TensorBoard run for each kind of them."""

import importlib.util
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from common.errors import UserError, print_error

if typing.TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from common.train.run_setup import RunSetup

FOLDER = "tensorboard"  # in the run folder
_KINDS = ("train", "val", "lr_find")
_SCALARS = ("loss", "smoothed", "acc1", "acc5", "lr", "fps")


def check_installed() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package tensorboard is not installed; pip install tensorboard")


class EventFiles:
    """Scalars over the optimizer steps of a run, under their names in metrics.jsonl.

    A resumed run tells TensorBoard to drop what an earlier process wrote of the steps that it does again.

    Args:
      folder: of the run.
      setup: the run that begins or continues.
    """

    def __init__(self, folder: pathlib.Path, setup: "RunSetup") -> None:
        from torch.utils.tensorboard import SummaryWriter  # now, not in the first step

        self._writer_class = SummaryWriter
        self._folder, self._steps_per_epoch = folder / FOLDER, setup.plan.steps_per_epoch
        epoch, step = (setup.state["epoch"], setup.state["step"]) if setup.state else (0, 0)
        self._first_step = epoch * self._steps_per_epoch + step + 1
        # A run that was stopped in a validation does it again, at the last step of its epoch.
        self._first_validation = self._first_step - (step == self._steps_per_epoch)
        self._writers: dict[str, SummaryWriter] = {}
        self._failed = False

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a record. A failure (full disk) is reported once, then ignored: the run continues."""
        kind = values["kind"]
        if kind not in _KINDS or self._failed:
            return
        step = values["step"] + (values.get("epoch", 1) - 1) * self._steps_per_epoch
        try:
            writer = self._writers.get(kind) or self._open(kind)
            for name in _SCALARS:
                if name in values:
                    writer.add_scalar(name, values[name], step)
        except OSError as error:
            self._fail(error)

    def _open(self, kind: str) -> "SummaryWriter":
        first = {"lr_find": 1, "val": self._first_validation}.get(kind, self._first_step)
        self._writers[kind] = self._writer_class(self._folder / kind, purge_step=first, flush_secs=30)
        return self._writers[kind]

    def close(self) -> None:
        for writer in self._writers.values():
            try:
                writer.close()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            print_error(f"{self._folder}: cannot be written ({error.strerror}); the run goes on without")
        self._failed = True
