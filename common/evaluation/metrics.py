"""Top-k accuracy and loss as exact sums, for training, eval.py and postprocess.py.

Needs numpy only. Legend: N batch, K class.
"""

import dataclasses
import math

import numpy as np

from common.data.labels import HOLDS_NO_0

TOP_K = 5
# Losses are rounded to this many steps per unit: their float64 sum is then exact up to 2**23, in any order of images.
_LOSS_STEPS = 2.0**30
# Until how many steps, and above how many times the training loss or that of guessing, a validation loss is explained.
STEPS_OF_NOTE, _FACTOR_OF_NOTE = 500, 5


def label_ranks(logits_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Position of each label in its row sorted from high to low; of equal logits the lower index comes first.

    Args:
      labels_N: class indices in [0, K).
    Returns:
      int64 [N], 0 for a hit at top-1.
    Raises:
      ValueError: batch sizes differ, a label is outside [0, K), or a logit is NaN.
    """
    logits_NK, labels_N = np.asarray(logits_NK), np.asarray(labels_N)
    if logits_NK.ndim != 2 or len(logits_NK) != len(labels_N):
        raise ValueError(f"logits {logits_NK.shape} and labels {labels_N.shape} do not fit together")
    if len(labels_N) == 0:
        return np.zeros(0, np.int64)
    num_classes = logits_NK.shape[1]
    if labels_N.min() < 0 or labels_N.max() >= num_classes:
        raise ValueError(f"labels {labels_N.min()}..{labels_N.max()} outside [0, {num_classes})")
    if np.isnan(logits_NK).any():
        raise ValueError(f"NaN in the scores of row {int(np.argmax(np.isnan(logits_NK).any(axis=1)))}")
    own_N1 = np.take_along_axis(logits_NK, labels_N[:, None].astype(np.int64), axis=1)
    ahead_NK = (logits_NK > own_N1) | ((logits_NK == own_N1) & (np.arange(num_classes) < labels_N[:, None]))
    return ahead_NK.sum(axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits along the last axis, in their type."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities along the last axis, in the type of the logits."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def num_shifted_hits(logits_NK: np.ndarray, labels_N: np.ndarray) -> int:
    """Hits at top-1 if every label were one smaller, as where a label file counts from 1."""
    return int((np.asarray(logits_NK).argmax(axis=1) == np.asarray(labels_N) - 1).sum()) if len(labels_N) else 0


def fit_better(shifted: int, top1: int, seen: int) -> bool:
    """Whether labels that differ by one are meant: they give `shifted` hits at top-1, those of the file `top1`."""
    return 5 * shifted >= seen > 0 and shifted > 2 * top1


def smoothed_losses(logits_NK: np.ndarray, labels_N: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """Label-smoothed cross entropy of each row in float64, target probability 1 - s + s/K -> float64 [N]."""
    log_probs_NK = log_softmax(np.asarray(logits_NK, np.float64))
    own_N = np.take_along_axis(log_probs_NK, np.asarray(labels_N, np.int64)[:, None], axis=1)[:, 0]
    return -(1.0 - smoothing) * own_N - smoothing * log_probs_NK.mean(axis=1)


@dataclasses.dataclass
class Counts:
    """Hits at top-1..top-5, images seen and skipped, and the summed loss; sums of Counts are exact.

    With fewer than five classes, top-k beyond the class count equals the count at K; only the others are printed.

    Attributes:
      num_classes: columns of the logits; 0 where they are not known.
    """

    correct: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(TOP_K, np.int64))
    seen: int = 0
    skipped: int = 0
    loss_sum: float = 0.0
    shifted: int = 0  # see num_shifted_hits
    num_classes: int = 0

    def add(self, logits_NK: np.ndarray, labels_N: np.ndarray, smoothing: float = 0.0) -> None:
        """Count a batch."""
        ranks_N, self.num_classes = label_ranks(logits_NK, labels_N), np.shape(logits_NK)[1]
        self.add_ranks(ranks_N, num_shifted_hits(logits_NK, labels_N))
        if len(ranks_N):
            losses_N = smoothed_losses(logits_NK, labels_N, smoothing)
            self.loss_sum += float((np.rint(losses_N * _LOSS_STEPS) / _LOSS_STEPS).sum())

    def add_ranks(self, ranks_N: np.ndarray, num_shifted: int) -> None:
        """Count a batch by its label_ranks and num_shifted_hits, without a loss."""
        self.correct += (ranks_N[:, None] < np.arange(1, TOP_K + 1)).sum(axis=0)
        self.seen += len(ranks_N)
        self.shifted += num_shifted

    def note_on_labels(self, lowest: int) -> str:
        """A line to print where the labels of a file, of which `lowest` is the smallest, seem to count from 1."""
        top1 = int(self.correct[0])
        if lowest == 0 or not fit_better(self.shifted, top1, self.seen):
            return ""
        return (
            f"note: top-1 is {self.percent(1):.2f} %, and {100 * self.shifted / self.seen:.2f} % if every label were "
            f"one smaller; {HOLDS_NO_0}"
        )

    def percent(self, k: int) -> float:
        """Top-k accuracy in percent, 0..100, of the images seen."""
        return 100.0 * int(self.correct[k - 1]) / self.seen if self.seen else 0.0

    @property
    def printed_k(self) -> list[int]:
        """The k of the accuracies to print: top-k counts every image where there are k classes."""
        return [k for k in range(1, TOP_K + 1) if k == 1 or not self.num_classes or k < self.num_classes]

    @property
    def loss(self) -> float:
        """Mean loss of the images seen."""
        return self.loss_sum / self.seen if self.seen else 0.0

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        accuracies = " ".join(f"Acc@{k} {self.percent(k):.3f}" for k in (1, 5) if k in self.printed_k)
        return f"* {accuracies} loss {self.loss:.4f} ({self.seen} images{skipped})"


def note_on_loss(loss: float, train_loss: float, num_classes: int, steps: int, momentum: float | None) -> str:
    """Why the validation loss is far above the training loss at the start of a run, or an empty text."""
    if momentum is None or steps > STEPS_OF_NOTE or loss < _FACTOR_OF_NOTE * max(train_loss, math.log(num_classes)):
        return ""
    share = f"{100 * (1 - momentum) ** steps:.2g} %"
    return (
        f"note: the validation loss is not meaningful yet: after {steps} steps, {share} of batch norm's running "
        "statistics are still the initial values; validation uses these, training the statistics of each batch; expect "
        "comparable losses after some hundred steps"
    )
