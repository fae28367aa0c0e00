"""--cache-features: the classifier is trained alone, on features that the frozen body computes once.

The features of an image are the input of the classifier under the evaluation transform; those of its mirror image are a
second sample. A step takes all of them, so an epoch is one step. They are cached under a key of everything that they
depend on: weights, images (names, labels, sizes, modification times), input size, precision, device.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from common import distributed
from common.config import PROBE, TrainConfig
from common.data import cache, loader, sampling, transforms
from common.data.batch import Batch
from common.data.index import FolderIndex
from common.distributed import Group, World
from common.errors import Interrupted, UserError, print_error
from common.evaluation.metrics import Counts
from common.train import schedules
from common.train.run_log import RunLogger
from common.train.run_setup import RunSetup
from common.train.trainer import Trainer


class ProbeTrainer(Trainer):
    """A Trainer of the classifier alone. It validates and saves once, at the end: an epoch takes milliseconds."""

    def __init__(self, setup: RunSetup, group: Group, logger: RunLogger) -> None:
        super().__init__(setup, group, logger)
        self._saves = False

    def fit(self) -> dict[str, Any]:
        """Compute or read the features, then train to the end, or to a signal."""
        splits = self.setup.splits
        weights = self._weights_hash()
        train = self._features(splits.train, weights, is_mirrored=True)
        val = None if splits.val is None else self._features(splits.val, weights)
        self._train_batch = train
        self.validate.engine = self.train_step.train_classifier_alone()
        if val is not None:
            self.validate.batches = _cut(val, self.setup.config.eval_batch_size)
        return super().fit()

    def _batches(self) -> Iterator[Batch]:
        return iter([self._train_batch])

    def _is_last(self) -> bool:
        return self.state.epoch + 1 >= self.setup.config.epochs or self._reached_max_steps()

    def _validate(self) -> tuple[Counts | None, bool]:
        self._saves = self._is_last()
        return super()._validate() if self._saves else (None, False)

    def _log_progress(self) -> None:
        if (self.state.epoch + 1) % self.setup.config.print_freq == 0 or self._is_last():
            super()._log_progress()

    def _save(self, counts: Counts | None = None, is_best: bool = False) -> None:
        if self._saves:
            super()._save(counts, is_best)

    def _stop(self, action: int) -> None:
        self._saves = True
        super()._stop(action)

    # ---- features ------------------------------------------------------------------------------------------------

    def _weights_hash(self) -> str:
        """Hash of all weights but the classifier's."""
        digest, classifier = hashlib.sha256(), f"{self.setup.spec.classifiers[0]}."
        for name, tensor in self.train_step.model.state_dict().items():
            if not name.startswith(classifier):
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        return digest.hexdigest()

    def _features(self, images: FolderIndex, weights: str, is_mirrored: bool = False) -> Batch:
        """All images of a split as one batch of features [N, D], followed by their mirror images where asked for."""
        config, options = self.setup.config, self.setup.build_options
        files = hashlib.sha256()
        for i in range(len(images)):
            files.update(f"{images.stamp(i)};".encode())
        how = [config.image_size, is_mirrored, config.on_bad_image, config.full_fp32, self.train_step.amp_type]
        how += [self.group.device.kind, torch.__version__]
        how += sorted(item for item in options.items() if item[0] not in ("num_classes", "dropout"))
        key = f"features {weights} {images.fingerprint} {files.hexdigest()} {how}"
        started, stored = time.perf_counter(), cache.read(key)
        if stored is None:
            batch = self._compute(images, is_mirrored)
            arrays = {"features": batch.pixels_NHWC.numpy().ravel(), "labels": batch.labels_N.numpy()}
            arrays["indices"] = batch.indices_N.numpy()
            cache.write(key, {"bad": batch.bad}, arrays)
            how_long = f"computed in {time.perf_counter() - started:.1f} s"
        else:
            header, arrays = stored
            features, labels, indices = (
                torch.from_numpy(np.array(arrays[k])) for k in ("features", "labels", "indices")
            )
            batch = Batch(features.view(len(labels), -1), labels, indices, [(p, r) for p, r in header["bad"]], False)
            how_long = "from the cache"
        self.logger.info(f"features of {images.root}: {len(batch.labels_N)} samples, {how_long}")
        return batch

    def _compute(self, images: FolderIndex, is_mirrored: bool) -> Batch:
        config, engine, seen = self.setup.config, self.train_step.engine(), list[np.ndarray]()
        transform = transforms.eval_transform(self.setup.spec, config.image_size)
        batches = loader.EvalLoader(
            images,
            transform,
            config.eval_batch_size,
            config.on_bad_image,
            0,
            1,
            self.workers,
            self.group.device.pin_memory,
        )
        batches.waiting = self.interrupt.ends_wait
        classifier = engine.model.get_submodule(self.setup.spec.classifiers[0])
        hook = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu().numpy()))
        parts: list[list[np.ndarray]] = [[], []]
        labels, indices, bad = [], [], list[tuple[str, str]]()
        try:
            for batch in batches:
                batch.raise_if_failed()
                bad += batch.bad
                for path, reason in batch.bad:
                    print_error(f"skipped: {path} ({reason})")
                self.watchdog.phase("computing features")
                if (action := self.requested_action()) in (distributed.RESTART, distributed.STOP):
                    self._stop(action)
                labels.append(batch.labels_N)
                indices.append(batch.indices_N)
                for part, pixels in zip(parts, (batch.pixels_NHWC, batch.pixels_NHWC.flip(2)), strict=True):
                    if part is parts[0] or is_mirrored:
                        engine(pixels)
                        part.append(seen.pop())
        except Interrupted:
            self._stop(self.requested_action())
        finally:
            hook.remove()
            batches.close()
        times = 2 if is_mirrored else 1
        features = torch.from_numpy(np.concatenate([*parts[0], *parts[1]]))
        return Batch(features, torch.cat(labels).repeat(times), torch.cat(indices).repeat(times), bad, False)


class _ClassifierTrainer(ProbeTrainer):
    """Of --head-init probe: it writes no checkpoint, so a signal leaves the run as it was."""

    def _stop(self, action: int) -> None:
        self.stop_unsaved(action)

    def classifier(self) -> dict[str, torch.Tensor]:
        """Train, and return the classifier's part of the state dict, on the host; nothing of it after a signal."""
        batch, step = self._features(self.setup.splits.train, self._weights_hash(), is_mirrored=True), self.train_step
        step.train_classifier_alone()
        step.train()
        steps = self.setup.config.epochs
        for epoch in range(steps):
            self.watchdog.phase("training the classifier")
            if self.requested_action() in (distributed.RESTART, distributed.STOP):
                return {}
            loss = float(step(epoch, 0, [batch]).losses[0])
        if not math.isfinite(loss):
            raise UserError(f"--head-init: the loss of the classifier is {loss}; the weights of --pretrained diverged")
        self.logger.info(f"--head-init: the classifier was trained alone for {steps} steps, to a loss of {loss:.4f}")
        name = self.setup.spec.classifiers[0]
        return {
            f"{name}.{key}": value.to("cpu", torch.float32)
            for key, value in step.model.get_submodule(name).state_dict().items()
        }


def trained_classifier(setup: RunSetup, group: Group, logger: RunLogger) -> dict[str, torch.Tensor]:
    """The classifier that the recipe probe finds for the weights of a run that is about to start.

    Every rank computes it by itself; it is a function of weights, images and seed.
    """
    unused = {name: getattr(TrainConfig, name) for name in TrainConfig.NO_EFFECT_ON_FEATURES}
    own: dict[str, Any] = dict(PROBE, head_lr_scale=1.0, ema=0.0, clip_grad=0.0, compile=False, max_steps=None)
    config, options = dataclasses.replace(setup.config, **unused, **own), dict(setup.build_options)
    if "dropout" in options:
        options["dropout"] = PROBE["dropout"]
    num_images = len(setup.splits.train)
    trial = dataclasses.replace(
        setup,
        config=config,
        splits=dataclasses.replace(setup.splits, val=None),
        plan=sampling.StepPlan(num_images, 1, num_images),
        build_options=options,
        lr_at=schedules.cosine_step(config, 1),
    )
    alone = Group(World(local_size=group.world.local_size), group.device)
    trainer = _ClassifierTrainer(trial, alone, logger)
    try:
        found = trainer.classifier()
    finally:
        trainer.close()
    trainer.stop_unsaved(group.sync_status(trainer.requested_action()))  # for a signal to any rank
    return found


def _cut(batch: Batch, size: int) -> list[Batch]:
    """A batch as batches of at most `size` samples; the first one names the bad files."""
    parts = zip(*(tensor.split(size) for tensor in batch[:3]), strict=True)
    return [
        Batch(features, labels, indices, [] if i else batch.bad, False)
        for i, (features, labels, indices) in enumerate(parts)
    ]
