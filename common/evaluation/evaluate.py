"""One evaluator for training, eval.py and every deployment engine: each image is counted exactly once."""

import sys

import numpy as np

from common.data.decode import BadImage
from common.distributed import RUN, STOP
from common.errors import RunError
from common.evaluation.metrics import Counts


def evaluate(engine, batches, num_images, group, smoothing=0.0, interrupted=lambda: False):
    """Score a split.

    Args:
      engine: function from uint8 [N, H, W, 3] to logits [N, K] on the host.
      batches: EvalLoader of this rank's share.
      num_images: images in the whole split.
      group: distributed.Group; counts are summed over its ranks once, at the end.
      smoothing: label smoothing of the reported loss.
      interrupted: asked before every batch; True ends the evaluation on all ranks.
    Returns:
      Counts over all ranks, or None when a rank was interrupted.
    Raises:
      BadImage: a file does not decode (unless the loader skips those).
      RunError: a score is NaN.
    """
    counts, error, stopped = Counts(), None, False
    try:
        for batch in batches:
            if stopped := interrupted():
                break
            batch.raise_if_failed()
            counts.skipped += len(batch.bad)
            for path, reason in batch.bad:
                print(f"skipped: {path} ({reason})", file=sys.stderr, flush=True)
            if len(batch.labels_N):
                logits_NK = engine(batch.pixels_NHWC)
                if np.isnan(logits_NK).any():
                    raise RunError(
                        "the network's scores of validation images are not numbers (NaN): the training "
                        "diverged; lower --lr, or evaluate an earlier checkpoint"
                    )
                counts.add(logits_NK, batch.labels_N.numpy(), smoothing)
    except (BadImage, RunError) as found:
        error = found
    if group.sync_status(STOP if stopped else RUN, error):
        return None
    *correct, seen, skipped, loss_sum = group.all_reduce_sum(
        [*counts.correct, counts.seen, counts.skipped, counts.loss_sum]
    )
    total = Counts(np.array(correct, np.int64), int(seen), int(skipped), loss_sum)
    assert total.seen + total.skipped == num_images, f"counted {total.seen} + {total.skipped} of {num_images} images"
    return total
