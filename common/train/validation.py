"""Validation during training."""

from common.data import loader, transforms
from common.distributed import Group
from common.evaluation.evaluate import evaluate
from common.evaluation.metrics import Counts
from common.evaluation.torch_classifier import TorchClassifier
from common.train import losses
from common.train.run_setup import RunSetup


class Validator:
    """Scores the validation split with the weights that are being trained.

    Attributes:
      loader: this rank's share of the split; None without a validation set.
    """

    def __init__(self, setup: RunSetup, group: Group, engine: TorchClassifier, workers: int) -> None:
        config, world = setup.config, group.world
        self._engine, self._group, self._images = engine, group, setup.splits.val
        self._smoothing = losses.effective_smoothing(config, setup.build_options["num_classes"])
        self._noted = False
        self.loader = None
        if self._images is not None:
            self.loader = loader.EvalLoader(
                self._images,
                transforms.eval_transform(setup.spec, config.image_size),
                config.eval_batch_size,
                config.on_bad_image,
                world.rank,
                world.size,
                workers,
                group.device.pin_memory,
            )

    def __call__(self) -> Counts | None:
        """Counts over all ranks; None where the wait for a batch was interrupted."""
        assert self._images is not None and self.loader is not None
        return evaluate(self._engine, self.loader, len(self._images), self._group, self._smoothing)

    def note_on_labels(self, counts: Counts) -> str:
        """See Counts; a text once, then an empty one."""
        if self._images is None or not self._images.label_file or self._noted:
            return ""
        note = counts.note_on_labels(int(self._images.labels.min()))
        self._noted = bool(note)
        return note

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
