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
        from common.train.run_log import RunLogger
        from common.train.trainer import Trainer

        setup = program.prepare(*program.parse(["--device=cpu", *argv]))
        setup = dataclasses.replace(setup, folder=pathlib.Path(folder))
        device, world = devices.Device("cpu"), distributed.World()
        device.activate()
        self.trainer = Trainer(setup, distributed.Group(world, device), RunLogger(None))
        self.trainer.train_step.network.train()
        self._batches = self.trainer.train_loader.epoch(0)

    def fetch(self):
        """Micro-batches of the next step."""
        micro_batches, error = self.trainer.fetch(self._batches)
        assert error is None
        return micro_batches

    def step(self, micro_batches=None) -> None:
        """One step; of the next micro-batches where none are given."""
        trainer, state = self.trainer, self.trainer.state
        if state.step == trainer.setup.plan.steps_per_epoch:
            state.epoch, state.step = state.epoch + 1, 0
            self._batches = trainer.train_loader.epoch(state.epoch)
        micro_batches = micro_batches or self.fetch()
        trainer.loss_meter.add(state.epoch, state.step, trainer.train_step(state.epoch, state.step, micro_batches))
        state.step += 1

    def close(self):
        self.trainer.close()
