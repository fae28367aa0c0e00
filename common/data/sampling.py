"""Sampling order: the images and random numbers of a step are a function of (seed, epoch, step).

There is no sampler state: a run resumes in the middle of an epoch at no cost, and workers, prefetching and the number
of ranks do not change what is trained on.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from common.errors import UserError

# Batches that each dataloader worker prepares ahead.
PREFETCH = 4
# First words of the seed sequences: streams of different use never coincide.
EPOCH, IMAGE, STEP = 1, 2, 3


def stream_seed(*words: int) -> int:
    """A 63-bit seed; numpy guarantees the values of SeedSequence across versions."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def image_seed(seed: int, epoch: int, index: int) -> int:
    """Seed of the augmentation of one image in one epoch."""
    return stream_seed(IMAGE, seed, epoch, index)


def epoch_permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Order of the images in an epoch: int64 [num_images].

    Sorts raw Philox words instead of calling a shuffle, whose result may change between numpy versions.
    """
    words = np.random.Philox(np.random.SeedSequence((EPOCH, seed, epoch))).random_raw(num_images)
    return np.argsort(words, kind="stable")


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """How the images of a step are cut into micro-batches and shared by ranks.

    Attributes:
      num_images: images in the training set.
      num_micro_batches: micro-batches of one step over all ranks; loss and gradient of a step depend on them only.
      micro_batch_size: images in each.
    """

    num_images: int
    num_micro_batches: int
    micro_batch_size: int

    @property
    def global_batch_size(self) -> int:
        """Images of one step over all ranks."""
        return self.num_micro_batches * self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Complete steps in an epoch; the remaining images, others in each epoch, are dropped."""
        return self.num_images // self.global_batch_size

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
) -> Iterator[list[tuple[int, int]]]:
    """Yield the micro-batches of one rank from `first_step` to the end of the epoch as (epoch, image index) pairs."""
    permutation = epoch_permutation(seed, epoch, plan.num_images)
    for step in range(first_step, plan.steps_per_epoch):
        for micro_batch in plan.micro_batches_of(rank, world_size):
            start = step * plan.global_batch_size + micro_batch * plan.micro_batch_size
            yield [(epoch, int(i)) for i in permutation[start : start + plan.micro_batch_size]]
