"""The evaluation loop of training, eval.py and every engine: each image is counted exactly once."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from common import parallel
from common.data.batch import Array, Batch
from common.distributed import RUN, STOP, Group
from common.errors import Interrupted, RunError, UserError, print_error
from common.evaluation.metrics import Counts

Classifier = Callable[[Array], np.ndarray]  # uint8 pixels [N, H, W, 3] -> logits [N, K], both on the host

Observer = Callable[[Batch, np.ndarray], None]  # a batch and its logits


def scored(classifier: Classifier, batches: Iterable[Batch], streams: int = 0) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with its logits [N, K]; [0, 1] where no image of it decodes.

    Args:
      streams: how many batches the classifier computes at a time, in threads; 0: one, in this thread.
    Raises:
      BadImage: a file does not decode (unless the loader skips those).
      RunError: a logit is NaN.
    """

    def score(batch: Batch) -> tuple[Batch, np.ndarray]:
        batch.raise_if_failed()
        logits_NK = classifier(batch.pixels_NHWC) if len(batch.labels_N) else np.zeros((0, 1), np.float32)
        if np.isnan(logits_NK).any():
            raise RunError(
                "the logits of validation images are NaN: the training diverged; lower --lr, or evaluate an earlier "
                "checkpoint",
                is_final=True,
            )
        return batch, logits_NK

    return parallel.in_order(score, batches, streams)


def evaluate(
    classifier: Classifier,
    batches: Iterable[Batch],
    num_images: int,
    group: Group,
    smoothing: float = 0.0,
    observer: Observer | None = None,
    streams: int = 0,
) -> Counts | None:
    """Score a split.

    Args:
      batches: EvalLoader of this rank's share; Interrupted raised by it ends the evaluation on all ranks.
      num_images: images of the whole split.
      group: its ranks; counts are all-reduced once, at the end.
      smoothing: label smoothing of the reported loss.
      observer: called with each batch; it may raise UserError.
      streams: see `scored`.
    Returns:
      Counts over all ranks, or None when a rank was interrupted.
    Raises:
      BadImage: a file does not decode (unless the loader skips those).
      RunError: a logit is NaN, or a dataloader worker failed.
      UserError: a limit of the machine stops the dataloader workers.
    """
    counts, stopped = Counts(), False
    error: Exception | None = None
    try:
        for batch, logits_NK in scored(classifier, batches, streams):
            counts.skipped += len(batch.bad)
            for path, reason in batch.bad:
                print_error(f"skipped: {path} ({reason})")
            if len(batch.labels_N):
                counts.add(logits_NK, np.asarray(batch.labels_N), smoothing)
            if observer is not None:
                observer(batch, logits_NK)
    except Interrupted:
        stopped = True
    except (UserError, RunError) as raised:
        error = raised
    if group.sync_status(STOP if stopped else RUN, error):
        return None
    *correct, seen, skipped, loss_sum, shifted = group.all_reduce_sum(
        [*counts.correct, counts.seen, counts.skipped, counts.loss_sum, counts.shifted]
    )
    total = Counts(np.array(correct, np.int64), int(seen), int(skipped), loss_sum, int(shifted), counts.num_classes)
    assert total.seen + total.skipped == num_images, f"counted {total.seen} + {total.skipped} of {num_images} images"
    return total
