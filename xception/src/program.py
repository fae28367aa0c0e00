"""The shared training program under the seed's command line."""

import dataclasses
import os

from common import cli
from common.errors import UserError
from common.train.program import TrainProgram
from xception.src import config as recipes
from xception.src import dataset, lr_generator
from xception.src.run_log import XceptionReport

RECIPES = {"Ascend": recipes.ASCEND, "GPU": recipes.GPU}


class XceptionProgram(TrainProgram):
    """Xception's training: recipes by device, images per device, and --resume with the weights of any program."""

    def __init__(self, description):
        super().__init__(recipes.SPEC, recipes.GPU, description, lr_generator.SCHEDULES, load_data=dataset.load_splits)

    def parse(self, argv=None):
        word = cli.parse(dataclasses.replace(recipes.GPU, recipe="auto"), self.description, argv)[0]
        self.recipe = RECIPES[word.recipe if word.recipe != "auto" else _recipe_of(word.device_kind)]
        config, explicit = super().parse(argv)
        lr_generator.mode(config.lr_schedule, say=lambda line: None)
        if config.is_fp32:
            config = dataclasses.replace(config, amp=False)
        if not config.use_label_smooth:
            config = dataclasses.replace(config, label_smoothing=0.0)
        if config.resume not in ("", "auto") and _weights_only(config.resume):
            config = dataclasses.replace(config, pretrained=config.resume, resume="")
        if config.evaluate and not config.eval_path:
            raise UserError("--evaluate: needs --eval-path, or use eval.py")
        return config, explicit

    def report(self, folder, job):
        return XceptionReport(folder, job)

    def evaluation(self, config, explicit):
        return dataclasses.replace(super().evaluation(config, explicit), data=config.eval_path)

    def global_batch(self, config, explicit, state, world_size, machines):
        """--batch-size counts images per device, as in the seed; a resumed run keeps its own where none is given."""
        if state is not None and "batch_size" not in explicit:
            return state["num_micro_batches"] * state["micro_batch_size"]
        return config.batch_size * world_size

    def first_epoch(self, config, explicit, state):
        """Epochs done: --finish_epoch says it for files that do not know."""
        if state is not None and "finish_epoch" in explicit and config.finish_epoch != state["epoch"]:
            raise UserError(f"--finish-epoch: {config.finish_epoch}, but {config.resume} has finished {state['epoch']}")
        if state is None and config.finish_epoch and not config.pretrained:
            raise UserError(f"--finish-epoch: {config.finish_epoch}, needs the weights to go on with; give --resume")
        return config.finish_epoch


def _recipe_of(device_kind):
    """Word of the recipe for a device; finds out which one `auto` is."""
    if device_kind == "auto":
        from common.device import device as devices

        device_kind = devices.choose("auto").kind
    return "Ascend" if device_kind == "npu" else "GPU"


def _weights_only(path):
    """Whether a file holds weights without the state of a run: MindSpore's, Keras', or a converted one."""
    if not os.path.isfile(path):
        return False  # the shared program says so
    from common.weights.load import read_checkpoint

    return "step" not in read_checkpoint(path, recipes.SPEC).metadata
