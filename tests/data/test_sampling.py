"""Which images a step uses: a function of (seed, epoch, step), for any number of ranks."""

import itertools

import numpy as np
import pytest

from common.data import sampling
from common.errors import UserError
from common.train.step import step_seed

GOLDEN_PERMUTATION = [2, 0, 1, 4, 5, 6, 7, 3]
GOLDEN_SEED = 5874723144925201505
PLAN = sampling.StepPlan(num_images=100, num_micro_batches=6, micro_batch_size=4)


def steps(world_size, epoch=0, first_step=0):
    """{step: [micro-batches in index order]} as all ranks together see them."""
    seen = {}
    for rank in range(world_size):
        share = len(PLAN.micro_batches_of(rank, world_size))
        batches = sampling.epoch_batches(PLAN, 7, epoch, first_step, rank, world_size)
        for n, batch in enumerate(batches):
            seen.setdefault(first_step + n // share, []).append(batch)
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_micro_batches_do_not_depend_on_the_number_of_ranks(world_size):
    assert steps(world_size) == steps(1)


def test_an_epoch_uses_every_image_once_but_for_the_dropped_rest():
    images = [i for batches in steps(1).values() for batch in batches for _, i in batch]
    assert len(images) == len(set(images)) == 96
    assert PLAN.steps_per_epoch == 4


def test_resuming_in_the_middle_gives_the_rest_of_the_epoch():
    whole = steps(2)
    assert steps(2, first_step=3) == {3: whole[3]}


def test_epochs_differ_and_the_permutation_is_stable_across_versions():
    first, second = (sampling.epoch_permutation(0, epoch, 1000) for epoch in (0, 1))
    assert sorted(first) == list(range(1000))
    assert not np.array_equal(first, second)
    # If this changes, runs that were stopped cannot be continued by the new code.
    assert sampling.epoch_permutation(0, 0, 8).tolist() == GOLDEN_PERMUTATION
    assert step_seed(1, 2, 3, 4) == GOLDEN_SEED


def test_streams_of_different_use_do_not_coincide():
    seeds = [sampling.image_seed(0, e, i) for e, i in itertools.product(range(20), range(20))]
    seeds += [step_seed(0, e, s, m) for e, s, m in itertools.product(range(8), range(8), range(8))]
    assert len(set(seeds)) == len(seeds)


def test_ranks_that_cannot_share_equally_are_told_which_can():
    with pytest.raises(UserError, match="4 ranks cannot share 6 micro-batches.*possible: 1, 2, 3, 6"):
        PLAN.check_world_size(4)
