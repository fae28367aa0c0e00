"""The training program under the command line of the MindSpore package."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from common import cli
from common.config import TrainConfig
from common.data import index
from common.device import diagnosis
from common.errors import UserError
from common.evaluation.program import EvalConfig
from common.train.program import TrainProgram
from common.train.run_setup import RunSetup
from xception.src import dataset, lr_generator
from xception.src.config import DEVICES, RECIPES, SPEC, XceptionConfig
from xception.src.run_log import XceptionLogger


class XceptionProgram(TrainProgram):
    """Recipes by device, batch size per device, and --resume with the weights of any program."""

    extra_schedules = lr_generator.SCHEDULES

    def __init__(self, description: str) -> None:
        super().__init__(SPEC, RECIPES, description)

    def default_recipe(self, argv: Sequence[str] | None) -> str:
        """Ascend's on an npu, else GPU's."""
        parser = cli.Parser("", add_help=False)
        parser.add_argument("--device-target", "--device", default="auto")
        parser.add_argument("--npu", default=None)
        given = parser.parse_known_args(argv)[0]
        kind = "npu" if given.npu is not None else DEVICES.get(given.device_target, given.device_target)
        if kind == "auto" and diagnosis.is_installed("npu"):
            from common.device import device as devices  # imports torch, which --help must not wait for

            kind = devices.choose("auto").kind
        return "Ascend" if kind == "npu" else "GPU"

    def parse(self, argv: Sequence[str] | None = None) -> tuple[XceptionConfig, frozenset[str]]:
        config, explicit = super().parse(argv)
        assert isinstance(config, XceptionConfig)
        lr_generator.mode(config.lr_schedule)
        if config.is_fp32:
            config = dataclasses.replace(config, amp=False)
        if not config.use_label_smooth:
            config = dataclasses.replace(config, label_smoothing=0.0)
        if config.resume not in ("", "auto") and _weights_only(config.resume):
            config = dataclasses.replace(config, pretrained=config.resume, resume="")
        if config.evaluate and not config.eval_path:
            raise UserError("--evaluate: needs --eval-path, or use eval.py")
        return config, explicit

    def load_splits(self, config: TrainConfig) -> index.Splits:
        assert isinstance(config, XceptionConfig)
        return dataset.load_splits(config)

    def make_logger(self, folder: pathlib.Path | None, setup: RunSetup) -> XceptionLogger:
        return XceptionLogger(folder, setup)

    def evaluation_config(self, config: TrainConfig, explicit: frozenset[str]) -> EvalConfig:
        assert isinstance(config, XceptionConfig)
        return dataclasses.replace(super().evaluation_config(config, explicit), data=config.eval_path)

    def global_batch(
        self,
        config: TrainConfig,
        explicit: frozenset[str],
        state: dict[str, Any] | None,
        world_size: int,
        machines: int,
    ) -> int:
        """--batch-size counts images per device; a resumed run keeps its own where none is given."""
        if state is not None and "batch_size" not in explicit:
            return state["num_micro_batches"] * state["micro_batch_size"]
        return config.batch_size * world_size

    def batch_size_of(self, config: TrainConfig, micro_batch: int, devices: int) -> int:
        return micro_batch * config.accumulate

    def first_epoch(self, config: TrainConfig, explicit: frozenset[str], state: dict[str, Any] | None) -> int:
        """Epochs done: --finish_epoch, for weight files that do not store it."""
        assert isinstance(config, XceptionConfig)
        if state is not None and "finish_epoch" in explicit and config.finish_epoch != state["epoch"]:
            raise UserError(f"--finish-epoch: {config.finish_epoch}, but {config.resume} has finished {state['epoch']}")
        if state is None and config.finish_epoch and not config.pretrained:
            raise UserError(f"--finish-epoch: {config.finish_epoch}, needs the weights to go on with; give --resume")
        return config.finish_epoch


def _weights_only(path: str) -> bool:
    """Whether a file holds weights without the state of a run: MindSpore's, Keras', or a converted one."""
    if not os.path.isfile(path):
        return False  # reported when the checkpoint is opened
    from common.weights.load import read_checkpoint

    return "step" not in read_checkpoint(path, SPEC).metadata
