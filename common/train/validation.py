"""Validation during training."""

import time
from collections.abc import Iterable

from common.data import loader, transforms
from common.data.batch import Batch
from common.distributed import Group
from common.evaluation.evaluate import evaluate
from common.evaluation.metrics import Counts, note_on_loss
from common.evaluation.torch_classifier import TorchClassifier, norm_momentum
from common.train import losses
from common.train.run_setup import RunSetup


class Validator:
    """Scores the validation split with the weights that are being trained.

    Attributes:
      loader: this rank's share of the split; None without a validation set.
      engine, batches: what is scored: the network and the batches of `loader`, or a part of it and its input.
      seconds: duration of the last validation; 0 before the first.
    """

    def __init__(self, setup: RunSetup, group: Group, engine: TorchClassifier, workers: int) -> None:
        config, world = setup.config, group.world
        self.engine, self._group, self._images = engine, group, setup.splits.val
        self._smoothing = losses.effective_smoothing(config, setup.build_options["num_classes"])
        self._num_classes, self._ema = setup.build_options["num_classes"], config.ema
        pretrained = config.pretrained or (setup.state or {"config": {}})["config"].get("pretrained")
        self._starts_statistics = not pretrained and not config.freeze_norm
        self._noted: set[str] = set()
        self.loader, self.seconds = None, 0.0
        if self._images is not None:
            self.loader = loader.EvalLoader(
                self._images,
                transforms.eval_transform(setup.spec, config.evaluation_size),
                config.eval_batch_size,
                config.on_bad_image,
                world.rank,
                world.size,
                workers,
                group.device.pin_memory,
            )
        self.batches: Iterable[Batch] | None = self.loader

    def __call__(self) -> Counts | None:
        """Counts over all ranks; None where the wait for a batch was interrupted."""
        assert self._images is not None and self.batches is not None
        started = time.perf_counter()
        counts = evaluate(self.engine, self.batches, len(self._images), self._group, self._smoothing)
        self.seconds = time.perf_counter() - started
        return counts

    def notes(self, counts: Counts, train_loss: float, steps: int) -> list[str]:
        """Lines on a result that means something else than it seems to; each once in a run.

        Args:
          train_loss: of the last progress line.
          steps: optimizer steps since the start of the run.
        """
        momentum = norm_momentum(self.engine.model) if self._starts_statistics else None
        found = {
            "labels": counts.note_on_labels(int(self._images.labels.min()))
            if self._images is not None and self._images.label_file
            else "",
            "loss": note_on_loss(counts.loss, train_loss, self._num_classes, steps, momentum),
            "ema": note_on_ema(self._ema, steps),
        }
        new = {kind: note for kind, note in found.items() if note and kind not in self._noted}
        self._noted |= new.keys()
        return list(new.values())

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


def note_on_ema(decay: float, steps: int) -> str:
    """Why averaged weights score low at the start of a run, or an empty text."""
    initial = decay ** (steps - 1)  # the first update copies the weights
    if not decay or initial < 0.5:
        return ""
    return (
        f"note: validation scores the averaged weights (--ema {decay:g}); after {steps} steps they are "
        f"{100 * initial:.0f} % those of the first step"
    )
