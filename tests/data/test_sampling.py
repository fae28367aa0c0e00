"""Which images a step uses: a function of (seed, epoch, step), for any number of ranks."""

import collections
import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest

from common.data import sampling
from common.errors import UserError
from common.train.step import step_seed

GOLDEN_ORDER = [5, 2, 1, 6, 3, 7, 4, 0]
GOLDEN_LARGE = [62584676, 95328597, 44631844]
GOLDEN_SEED = 5874723144925201505
PLAN = sampling.StepPlan(num_images=100, num_micro_batches=6, micro_batch_size=4)


def steps(world_size, epoch=0, first_step=0, plan=PLAN):
    """{step: [micro-batches in index order]} as all ranks together see them."""
    seen = {}
    for rank in range(world_size):
        share = len(plan.micro_batches_of(rank, world_size))
        batches = sampling.epoch_batches(plan, 7, epoch, first_step, rank, world_size)
        for n, batch in enumerate(batches):
            seen.setdefault(first_step + n // share, []).append(batch)
    return seen


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_micro_batches_do_not_depend_on_the_number_of_ranks(world_size):
    assert steps(world_size) == steps(1)


def test_an_epoch_uses_every_image_once_but_for_the_dropped_rest():
    images = [i for batches in steps(1).values() for batch in batches for _, i, _ in batch]
    assert len(images) == len(set(images)) == 96
    assert PLAN.steps_per_epoch == 4


def test_resuming_in_the_middle_gives_the_rest_of_the_epoch():
    whole = steps(2)
    assert steps(2, first_step=3) == {3: whole[3]}


def order(seed, epoch, num_images):
    return sampling.images_at(seed, epoch, num_images, np.arange(num_images))


def slow_images_at(seed, epoch, num_images, positions):
    """images_at with Python's integers of any size."""

    def mixed(word):
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
        return word ^ (word >> 31)

    rows = next(n for n in itertools.count(2, 2) if n * n >= num_images)
    columns = next(n for n in itertools.count(1) if rows * n >= num_images)
    words = np.random.SeedSequence((1, seed, epoch)).generate_state(32, np.uint32).tolist()
    keys = [low + (high << 32) for low, high in zip(words[::2], words[1::2], strict=True)]

    def image_at(position):
        row, column = position // columns, position % columns
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            row = (row + mixed((column + even) % 2**64)) % rows
            column = (column + mixed((row + odd) % 2**64)) % columns
        found = row * columns + column
        return found if found < num_images else image_at(found)

    return [image_at(position) for position in positions]


REPEATED = dataclasses.replace(PLAN, repeats=3)


def test_repeats_of_an_image_are_in_different_micro_batches_of_its_step():
    """24 places of a step, three for each of 8 images, dealt to 6 micro-batches of 4."""
    images = order(7, 0, 100).tolist()
    places = [(images[place // 3], place % 3) for place in range(96)]
    for step, batches in steps(1, plan=REPEATED).items():
        expected = [places[24 * step + m : 24 * (step + 1) : 6] for m in range(6)]
        assert [[(i, repeat) for _, i, repeat in batch] for batch in batches] == expected
        assert all(len({i for _, i, _ in batch}) == 4 for batch in batches)
    assert REPEATED.steps_per_epoch == 4 and REPEATED.images_per_epoch == 32


@pytest.mark.parametrize("world_size", [2, 3])
def test_repeats_do_not_depend_on_ranks_and_resume_in_the_middle(world_size):
    whole = steps(1, plan=REPEATED)
    assert steps(world_size, plan=REPEATED) == whole
    assert steps(world_size, first_step=2, plan=REPEATED) == {2: whole[2], 3: whole[3]}


def test_an_image_whose_repeats_do_not_fit_in_a_step_continues_in_the_next():
    plan = sampling.StepPlan(num_images=10, num_micro_batches=1, micro_batch_size=4, repeats=3)
    images = order(7, 0, 10).tolist()
    seen = [(i, repeat) for (batch,) in steps(1, plan=plan).values() for _, i, repeat in batch]
    assert seen == [(images[place], repeat) for place in (0, 1) for repeat in range(3)] + [
        (images[2], 0),
        (images[2], 1),
    ]
    assert plan.images_per_epoch == 3


def test_every_epoch_is_a_permutation_of_the_images_at_any_size():
    sizes = {*range(1, 70), 999, 1000, 10_007, *(2**n + k for n in range(7, 15) for k in (-1, 0, 1))}
    for size in sizes:
        assert np.array_equal(np.sort(order(5, size % 3, size)), np.arange(size)), size


def test_the_order_is_the_same_everywhere():
    # If this changes, runs that were stopped within an epoch cannot be continued by the new code: raise ORDER_VERSION.
    assert order(0, 0, 8).tolist() == GOLDEN_ORDER
    assert sampling.images_at(3, 7, 100_000_000, [0, 1, 99_999_999]).tolist() == GOLDEN_LARGE
    assert sampling.ORDER_VERSION == 2
    assert step_seed(1, 2, 3, 4) == GOLDEN_SEED
    for size in (1, 2, 3, 5, 17, 64, 65, 1_281_167, 14_197_122, 100_000_000, 2**36 + 1):
        positions = range(size) if size < 100 else range(size - 40, size)
        found = sampling.images_at(11, 2, size, np.array(positions))
        assert found.tolist() == slow_images_at(11, 2, size, positions), size


def deviation(counts, expected, freedom):
    """(Chi-square - its mean) / its standard deviation."""
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", [4, 5])
def test_the_orders_of_a_few_images_are_equally_likely(size):
    found = collections.Counter(tuple(order(1, epoch, size).tolist()) for epoch in range(6000))
    counts = np.array([found[one] for one in itertools.permutations(range(size))])
    assert abs(deviation(counts, counts.mean(), len(counts) - 1)) < 3


@pytest.mark.parametrize("size", [30, 1000])
def test_positions_neighbors_and_epochs_are_uniform(size):
    orders = np.stack([order(2, epoch, size) for epoch in range(3000)])
    tenths = orders * 10 // size

    def pairs(first, second):
        return np.bincount((first * 10 + second).ravel(), minlength=100)

    # Position and image: every row and column of the table has a known sum in every epoch.
    counts = pairs(np.broadcast_to(np.arange(size) * 10 // size, tenths.shape), tenths)
    assert abs(deviation(counts, counts.mean(), 81 * size / (size - 1))) < 3
    # Images at one position of successive epochs.
    counts = pairs(tenths[:-1:2, ::7], tenths[1::2, ::7])
    assert abs(deviation(counts, counts.mean(), 99)) < 3
    # Images at successive positions: an image is never beside itself.
    counts = pairs(tenths[:, :-1:2], tenths[:, 1::2])
    expected = counts.sum() * (size / 100 - np.eye(10).ravel() / 10) / (size - 1)
    assert abs(deviation(counts, expected, 99)) < 3


def test_a_steps_order_reads_and_holds_a_few_numbers_at_any_size():
    peaks = []
    for size in (1_281_167, 100_000_000):
        tracemalloc.start()
        next(sampling.epoch_batches(sampling.StepPlan(size, 1, 256), 0, 0, 1000, 0, 1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 200_000 and peaks[1] <= 1.2 * peaks[0]


def test_streams_of_different_use_do_not_coincide():
    seeds = [sampling.image_seed(0, e, i, r) for e, i, r in itertools.product(range(20), range(20), range(3))]
    seeds += [step_seed(0, e, s, m) for e, s, m in itertools.product(range(8), range(8), range(8))]
    assert len(set(seeds)) == len(seeds)


def test_ranks_that_cannot_share_equally_are_told_which_can():
    with pytest.raises(UserError, match="4 ranks cannot share 6 micro-batches.*possible: 1, 2, 3, 6"):
        PLAN.check_world_size(4)
