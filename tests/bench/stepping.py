"""The repository's trainer, one step per call."""

import dataclasses
import pathlib


class Stepping:
    """A training run on the CPU that does one step per call.

    Args:
      program: TrainProgram.
      argv: its options.
      folder: its run folder.
    """

    def __init__(self, program, argv, folder):
        from common import distributed
        from common.device import device as devices
        from common.train.run_log import Report
        from common.train.trainer import Trainer

        job = dataclasses.replace(program.prepare(["--device=cpu", *argv]), folder=pathlib.Path(folder))
        device, world = devices.Device("cpu"), distributed.World()
        device.activate()
        self.trainer = Trainer(job, world, device, distributed.Group(world, device), Report(None))
        self.trainer.learner.network.train()
        self._batches = self.trainer.train_loader.epoch(0)

    def step(self):
        trainer = self.trainer
        if trainer.step == trainer.plan.steps_per_epoch:
            trainer.epoch, trainer.step = trainer.epoch + 1, 0
            self._batches = trainer.train_loader.epoch(trainer.epoch)
        mine, error = trainer._fetch(self._batches)
        assert error is None
        trainer.learner.train_step(trainer.epoch, trainer.step, mine)
        trainer.step += 1

    def close(self):
        self.trainer.close()
