"""Sampling order: the images and random numbers of a step are a function of (seed, epoch, step).

There is no sampler state: a run resumes in the middle of an epoch at no cost, and workers, prefetching and the number
of ranks do not change what is trained on.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from common.errors import UserError

# Batches that each dataloader worker prepares ahead.
PREFETCH = 4
# First words of the seed sequences: streams of different use never coincide.
EPOCH, IMAGE, STEP = 1, 2, 3
# Stored in checkpoints; raise it when `images_at` or `epoch_batches` give another order. 1 sorted Philox words.
ORDER_VERSION = 2
# With 12 rounds a chi-square test over the orders of 4 to 6 images still shows a bias, with 16 it does not.
_ROUNDS = 16


def stream_seed(*words: int) -> int:
    """A 63-bit seed; numpy guarantees the values of SeedSequence across versions."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def image_seed(seed: int, epoch: int, index: int, repeat: int = 0) -> int:
    """Seed of the augmentation of one image in one epoch; its repeats under --repeated-aug are counted from 0."""
    return stream_seed(IMAGE, seed, epoch, index, *([repeat] if repeat else []))


def images_at(seed: int, epoch: int, num_images: int, positions: np.ndarray) -> np.ndarray:
    """Images at some positions of an epoch's order: int64, shape of `positions` [N], each below `num_images`.

    A permutation that is computed where it is needed, so that time and memory depend on N alone: a Feistel network over
    the pairs (row, column) of a table with at least num_images cells (alternating modular addition: Black and Rogaway,
    https://eprint.iacr.org/2001/012). A cell behind the last image is permuted again until it is one ("cycle walking").
    """
    # An even number of rows: with two odd sides all permutations would be even ones.
    rows = 2 * (math.isqrt(num_images - 1) // 2 + 1)
    columns = -(-num_images // rows)
    sides = np.uint64(rows), np.uint64(columns)
    keys = np.random.SeedSequence((EPOCH, seed, epoch)).generate_state(_ROUNDS, np.uint64)
    cells = np.array(positions, np.uint64)
    outside = np.arange(len(cells))
    while len(outside):
        halves = list(np.divmod(cells[outside], sides[1]))
        for i, key in enumerate(keys):
            half = i % 2
            halves[half] = (halves[half] + _mixed(halves[1 - half] + key) % sides[half]) % sides[half]
        cells[outside] = halves[0] * sides[1] + halves[1]
        outside = outside[cells[outside] >= num_images]
    return cells.astype(np.int64)


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014) of uint64 words; numpy's products wrap on every platform."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """How the images of a step are cut into micro-batches and shared by ranks.

    Attributes:
      num_images: images in the training set.
      num_micro_batches: micro-batches of one step over all ranks; loss and gradient of a step depend on them only.
      micro_batch_size: images in each.
      repeats: how often each image occurs, every time augmented anew (--repeated-aug).
    """

    num_images: int
    num_micro_batches: int
    micro_batch_size: int
    repeats: int = 1

    @property
    def global_batch_size(self) -> int:
        """Images of one step over all ranks."""
        return self.num_micro_batches * self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Complete steps in an epoch; the remaining images, others in each epoch, are dropped.

        With repeats an epoch has as many steps and thus an n-th of the images, others in each epoch, as with
        torchvision's RASampler and timm's RepeatAugSampler.
        """
        return self.num_images // self.global_batch_size

    @property
    def images_per_epoch(self) -> int:
        """Different images that the steps of an epoch take."""
        return -(-self.steps_per_epoch * self.global_batch_size // self.repeats)

    def positions(self, step: int) -> np.ndarray:
        """Positions in the epoch that the micro-batches of a step take: int64 [num_micro_batches, micro_batch_size].

        Those of a step are consecutive; `repeats` of them in a row are one image. With repeats, neighbors are in
        different micro-batches where there are several, so that batch norm does not see an image twice.
        """
        start = step * self.global_batch_size
        positions = np.arange(start, start + self.global_batch_size)
        if self.repeats == 1:
            return positions.reshape(self.num_micro_batches, -1)
        return positions.reshape(-1, self.num_micro_batches).T

    def micro_batches_of(self, rank: int, world_size: int) -> range:
        """Indices of the micro-batches that a rank computes: a contiguous share."""
        share = self.num_micro_batches // world_size
        return range(rank * share, (rank + 1) * share)

    def check_world_size(self, world_size: int) -> None:
        """Raise UserError, with the possible numbers, when the ranks cannot share the micro-batches equally."""
        if self.num_micro_batches % world_size:
            possible = [n for n in range(1, self.num_micro_batches + 1) if self.num_micro_batches % n == 0]
            raise UserError(
                f"--devices: {world_size} ranks cannot share {self.num_micro_batches} micro-batches of "
                f"{self.micro_batch_size} images equally; possible: {', '.join(map(str, possible))}"
            )


def epoch_batches(
    plan: StepPlan, seed: int, epoch: int, first_step: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield the micro-batches of one rank from `first_step` to the end of the epoch as (epoch, image index, repeat)."""
    share = plan.micro_batches_of(rank, world_size)
    for step in range(first_step, plan.steps_per_epoch):
        places, repeats = np.divmod(plan.positions(step)[share.start : share.stop], plan.repeats)
        images = images_at(seed, epoch, plan.num_images, places.ravel()).reshape(places.shape)
        for batch in zip(images.tolist(), repeats.tolist(), strict=True):
            yield [(epoch, image, repeat) for image, repeat in zip(*batch, strict=True)]
