"""Two classifiers on the same images: accuracy of each, agreement of their top-1, differences of their logits.

Legend: N batch, K class without a background column.
"""

import dataclasses
import time
import typing
from collections.abc import Callable, Iterable

import numpy as np

from common.data.labels import HOLDS_NO_0
from common.errors import RunError
from common.evaluation.metrics import Counts, fit_better

if typing.TYPE_CHECKING:
    from common.data.batch import Batch

    LogitsOf = Callable[[Batch], np.ndarray]


@dataclasses.dataclass
class Comparison:
    """Sums over images, of constant size; classes are those of both, without background columns.

    Attributes:
      a, b: hits of each.
      agreed: images with the same top-1.
      smaller, larger: hits of A and of B at top-1 if every label were one smaller, or one larger.
      max_difference: largest difference of a logit.
      seconds_a, seconds_b: time of the classifiers over `timed` images.
    """

    a: Counts = dataclasses.field(default_factory=Counts)
    b: Counts = dataclasses.field(default_factory=Counts)
    agreed: int = 0
    smaller: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    larger: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    max_difference: float = 0.0
    seconds_a: float = 0.0
    seconds_b: float = 0.0
    timed: int = 0
    _num_logits: int = 0
    _sum_absolute: float = 0.0
    _sum_squares: float = 0.0
    _sum_squares_a: float = 0.0
    _sum_cosine: float = 0.0

    def add(
        self, logits_a: np.ndarray, logits_b: np.ndarray, labels_N: np.ndarray, background: tuple[int, int]
    ) -> None:
        """Count a batch.

        Args:
          logits_a, logits_b: [N, background + K]; where the numbers of classes differ, the first ones are compared.
          labels_N: classes, without the background columns.
          background: columns before class 0 of each.
        Raises:
          RunError: a logit is NaN or infinite.
        """
        for name, logits in (("A", logits_a), ("B", logits_b)):
            if not np.isfinite(logits).all():
                found = "NaN" if np.isnan(logits).any() else "infinite"
                raise RunError(f"{name}: logits are {found}; its weights, or its float16 arithmetic, overflow")
        self.a.add(logits_a, labels_N + background[0])
        self.b.add(logits_b, labels_N + background[1])
        a_NK, b_NK = aligned(logits_a, logits_b, background)
        difference_NK = a_NK - b_NK
        norms = np.linalg.norm(a_NK, axis=1) * np.linalg.norm(b_NK, axis=1)
        best = [rows_NK.argmax(axis=1) for rows_NK in (a_NK, b_NK)]
        self.agreed += int((best[0] == best[1]).sum())
        for hits, offset in ((self.smaller, -1), (self.larger, 1)):
            for i in range(2):
                hits[i] += int((best[i] == labels_N + offset).sum())
        self.max_difference = max(self.max_difference, float(np.abs(difference_NK).max(initial=0)))
        self._num_logits += difference_NK.size
        self._sum_absolute += float(np.abs(difference_NK).sum())
        self._sum_squares += float((difference_NK**2).sum())
        self._sum_squares_a += float((a_NK**2).sum())
        self._sum_cosine += float(((a_NK * b_NK).sum(axis=1) / np.where(norms > 0, norms, 1)).sum())

    def add_times(self, seconds_a: float, seconds_b: float, num_images: int) -> None:
        """Add the time of both on a batch."""
        self.seconds_a += seconds_a
        self.seconds_b += seconds_b
        self.timed += num_images

    @property
    def seen(self) -> int:
        """Images compared."""
        return self.a.seen

    @property
    def agreement(self) -> float:
        """Images with the same top-1, percent."""
        return 100.0 * self.agreed / self.seen if self.seen else 100.0

    def label_offset(self, labels_N: np.ndarray) -> str:
        """What is wrong where the labels of the images differ by one from the classes, or nothing.

        Where one side is right with these labels, the columns of the other one are shifted, not the labels.
        """
        top1 = int(max(self.a.correct[0], self.b.correct[0]))
        for hits, word, possible, hint in (
            (self.smaller, "smaller", bool((labels_N > 0).all()), HOLDS_NO_0),
            (self.larger, "larger", True, "the labels are too small by one, as where one was subtracted twice"),
        ):
            for letter, counts, shifted in (("A", self.a, hits[0]), ("B", self.b, hits[1])):
                if possible and fit_better(shifted, top1, self.seen):
                    return (
                        f"label offset: top-1 of {letter} is {counts.percent(1):.2f} %, and "
                        f"{100 * shifted / self.seen:.2f} % if every label were one {word}; {hint}"
                    )
        return ""

    @property
    def drop(self) -> float:
        """Top-1 of A less that of B, in points of percent."""
        return self.a.percent(1) - self.b.percent(1)

    @property
    def mean_difference(self) -> float:
        """Mean of the absolute differences of all logits."""
        return self._sum_absolute / self._num_logits if self._num_logits else 0.0

    @property
    def relative_error(self) -> float:
        """Root mean square of the differences, relative to that of A's logits; 1 if these are all 0 and B's are not."""
        scale = self._sum_squares_a or self._sum_squares
        return float(np.sqrt(self._sum_squares / scale)) if scale else 0.0

    @property
    def cosine(self) -> float:
        """Mean over the images of the cosine between both rows of logits."""
        return self._sum_cosine / self.seen if self.seen else 1.0

    def ms_per_image(self, which: str) -> float:
        """Milliseconds per image of "a" or "b"."""
        return 1000.0 * (self.seconds_a if which == "a" else self.seconds_b) / max(1, self.timed)


def aligned(logits_a: np.ndarray, logits_b: np.ndarray, background: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The columns of the classes that both have, as float64."""
    a_NK, b_NK = logits_a[:, background[0] :], logits_b[:, background[1] :]
    num_classes = min(a_NK.shape[1], b_NK.shape[1])
    return a_NK[:, :num_classes].astype(np.float64), b_NK[:, :num_classes].astype(np.float64)


def compare(
    logits_a: "LogitsOf",
    logits_b: "LogitsOf",
    batches: "Iterable[Batch]",
    background: tuple[int, int] = (0, 0),
    label_offset: int = 0,
    observe: "Callable[[Batch, np.ndarray, np.ndarray], None] | None" = None,
) -> Comparison:
    """Run both classifiers over the same batches; the time of the first one is left out where there are others.

    Args:
      batches: an EvalLoader; its labels less `label_offset` are classes.
      background: see Comparison.add.
      observe: called with each batch and both logits.
    Raises:
      BadImage: a file does not decode. RunError: a logit is NaN.
    """
    found, first = Comparison(), None
    for batch in batches:
        batch.raise_if_failed()
        if not len(batch.labels_N):
            continue
        start = time.perf_counter()
        rows_a = logits_a(batch)
        middle = time.perf_counter()
        rows_b = logits_b(batch)
        measured = (middle - start, time.perf_counter() - middle, len(batch.labels_N))
        if first is None:
            first = measured
        else:
            found.add_times(*measured)
        found.add(rows_a, rows_b, batch.labels_N.numpy() - label_offset, background)
        if observe is not None:
            observe(batch, rows_a, rows_b)
    if first is not None and not found.timed:
        found.add_times(*first)
    return found
