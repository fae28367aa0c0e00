"""Bit-equality: killed runs of the three networks, evaluation in any split, restarts late in a long epoch."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import ROOT
from tiny import RECIPE, SPEC

from common.data import augment, index, loader, sampling, transforms
from common.evaluation import evaluate, metrics
from tools import models


@pytest.mark.parametrize("model", models.names())
def test_a_network_that_was_killed_twice_ends_with_the_same_bits(model):
    """With 0 to 3 dataloader workers, augmentation, mixup, dropout, EMA and gradient accumulation.

    All of its layers, with an eighth of their channels; `make chaos` kills the full networks.
    """
    words = [sys.executable, ROOT / "tests" / "chaos" / "chaos.py", f"--model={model}", "--faults=2", "--slim=8"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed rank                     2         2" in done.stdout and "bit-equal" in done.stdout


class _OneRank:
    """A process group of one rank; the test evaluates the ranks one after the other."""

    def sync_status(self, status, error):
        assert error is None
        return status

    def all_reduce_sum(self, numbers):
        return numbers


def _logits(pixels_NHWC):
    """Scores that depend on the image alone, so that a wrong count shows; some labels are hit, some are not."""
    return np.stack([torch.sin(image.double().sum() * torch.arange(1, 4)).numpy() for image in pixels_NHWC])


@pytest.fixture(scope="module")
def val(images):
    return index.load_splits(str(images)).val


def _counts(val, world_size, batch_size):
    total = metrics.Counts()
    for rank in range(world_size):
        batches = loader.EvalLoader(
            val, transforms.eval_transform(SPEC, 32), batch_size, "fail", rank, world_size, 0, False
        )
        share = len(range(rank, len(val), world_size))
        counts = evaluate.evaluate(_logits, batches, share, _OneRank())
        total.correct, total.seen = total.correct + counts.correct, total.seen + counts.seen
    return total


@pytest.mark.parametrize(("world_size", "batch_size"), [*itertools.product((1, 2, 3), (1, 7, 64))])
def test_every_image_is_counted_once_for_any_ranks_and_batch_size(val, world_size, batch_size):
    whole, cut = _counts(val, 1, 21), _counts(val, world_size, batch_size)
    assert cut.seen == len(val) == 21 and 0 < whole.correct[0] < 21
    assert cut.correct.tolist() == whole.correct.tolist()


class _Dry:
    """An index without image files."""

    def __init__(self, num_images):
        self.labels = np.zeros(num_images, np.int64)

    def __len__(self):
        return len(self.labels)

    def path(self, i):
        return i

    def read(self, i):
        return None


def test_a_restart_at_step_4000_of_5000_costs_no_more_than_a_fresh_start(monkeypatch):
    work = []  # images read, seeds computed, steps cut into micro-batches

    def counted(function):
        return lambda *args: work.append(function.__name__) or function(*args)

    monkeypatch.setattr(sampling, "image_seed", counted(sampling.image_seed))
    monkeypatch.setattr(sampling.StepPlan, "micro_batches_of", counted(sampling.StepPlan.micro_batches_of))
    plan = sampling.StepPlan(num_images=5000 * 256, num_micro_batches=1, micro_batch_size=256)

    def first_batch(step):
        """(indices, amount of work) of the first batch after a start at `step`."""
        work.clear()
        keep, dry = (lambda *_: work.append("read") or np.zeros((4, 4, 3), np.uint8)), _Dry(plan.num_images)
        images = loader.TrainLoader(dry, keep, plan, 0, "fail", 0, 1, 0, False)
        batch = next(iter(images.epoch(0, step)))
        return batch.indices_N.tolist(), len(work)

    (_, fresh), (indices, resumed) = first_batch(0), first_batch(4000)
    positions = np.arange(4000 * 256, 4001 * 256)
    assert indices == sampling.images_at(0, 0, plan.num_images, positions).tolist()
    assert resumed == fresh == 2 * 256 + 1


def _ids_read(train, plan, config, world_size, workers, first_step):
    """{(step, micro-batch): indices of the images in the batches of the ranks' dataloaders}."""
    found = {}
    for rank in range(world_size):
        batches = loader.TrainLoader(
            train, augment.TrainTransform(config), plan, config.seed, "fail", rank, world_size, workers, False
        )
        read = batches.epoch(1, first_step)
        for step in range(first_step, plan.steps_per_epoch):
            for m in plan.micro_batches_of(rank, world_size):
                found[step, m] = next(read).indices_N.tolist()
        assert next(read, None) is None
        batches.close()
    return found


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 1), (3, 2)])
def test_dataloaders_of_any_number_of_ranks_give_the_same_images_in_the_same_order(images, world_size, workers):
    train = index.load_splits(str(images)).train
    plan, config = sampling.StepPlan(len(train), 6, 2), dataclasses.replace(RECIPE, data=str(images))
    whole = _ids_read(train, plan, config, 1, 0, 0)
    assert sorted(i for ids in whole.values() for i in ids) == list(range(60)) and len(whole) == 30
    assert _ids_read(train, plan, config, world_size, workers, 0) == whole
    resumed = _ids_read(train, plan, config, world_size, workers, 3)
    assert resumed == {(step, m): ids for (step, m), ids in whole.items() if step >= 3}
