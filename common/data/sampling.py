"""Order as a function: which images a step uses and which random numbers it draws depend on (seed, epoch, step) alone.

No loader state exists, so a run resumes in the middle of an epoch at no cost, and workers, prefetching and the number
of ranks cannot change what is trained on.
"""

import dataclasses

import numpy as np

from common.errors import UserError

# Batches that each loader process prepares ahead.
PREFETCH = 4
# First words of the random streams, so that streams of different use never coincide.
_EPOCH, _IMAGE, _STEP = 1, 2, 3


def stream_seed(*words):
    """A 63-bit seed for one purpose; numpy guarantees SeedSequence's values across its versions."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def image_seed(seed, epoch, index):
    """Seed of the augmentation of one image in one epoch."""
    return stream_seed(_IMAGE, seed, epoch, index)


def step_seed(seed, epoch, step, micro_batch):
    """Seed of dropout and mixing in one micro-batch of a step."""
    return stream_seed(_STEP, seed, epoch, step, micro_batch)


def epoch_permutation(seed, epoch, num_images):
    """Order of the images in an epoch: int64 [num_images].

    Sorting raw Philox words, rather than calling a shuffle, keeps the order the same for every numpy version.
    """
    words = np.random.Philox(np.random.SeedSequence((_EPOCH, seed, epoch))).random_raw(num_images)
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
    def global_batch(self):
        """Images of one step over all ranks."""
        return self.num_micro_batches * self.micro_batch_size

    @property
    def steps_per_epoch(self):
        """Whole steps in an epoch; the images left over are dropped (another rest each epoch)."""
        return self.num_images // self.global_batch

    def micro_batches_of(self, rank, world_size):
        """Indices of the micro-batches that a rank computes: a contiguous share, in index order."""
        share = self.num_micro_batches // world_size
        return range(rank * share, (rank + 1) * share)

    def check_world_size(self, world_size):
        """Raise UserError when the ranks cannot share the micro-batches equally; the message names those that can."""
        if self.num_micro_batches % world_size:
            fitting = [n for n in range(1, self.num_micro_batches + 1) if self.num_micro_batches % n == 0]
            raise UserError(
                f"--devices: {world_size} ranks cannot share {self.num_micro_batches} micro-batches of "
                f"{self.micro_batch_size} images equally; possible: {', '.join(map(str, fitting))}"
            )


def epoch_batches(plan, seed, epoch, first_step, rank, world_size):
    """The micro-batches of one rank from `first_step` to the end of the epoch.

    Yields:
      lists of (epoch, image index) pairs, one list per micro-batch, in the order the rank computes them.
    """
    permutation = epoch_permutation(seed, epoch, plan.num_images)
    for step in range(first_step, plan.steps_per_epoch):
        for micro_batch in plan.micro_batches_of(rank, world_size):
            start = step * plan.global_batch + micro_batch * plan.micro_batch_size
            yield [(epoch, int(i)) for i in permutation[start : start + plan.micro_batch_size]]
