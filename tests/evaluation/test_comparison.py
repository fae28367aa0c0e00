"""Two classifiers on the same images: counts, agreement and differences computed by hand."""

import numpy as np
import pytest
import torch

from common.data.loader import Batch
from common.errors import RunError
from common.evaluation.comparison import Comparison, compare

A = np.array([[3.0, 1, 0], [0, 2, 1], [1, 0, 4], [0, 5, 0]], np.float32)
B = np.array([[3.0, 0, 0], [0, 1, 2], [1, 0, 4], [0, 5, 2]], np.float32)
LABELS = np.array([0, 1, 2, 0])


def batches(rows, labels, size=3):
    """Batches whose pixels hold the logits."""
    for i in range(0, len(rows), size):
        part = torch.from_numpy(rows[i : i + size])
        yield Batch(part, torch.from_numpy(labels[i : i + size]), torch.arange(i, i + len(part)), [], False)


def test_the_numbers_of_four_images_computed_by_hand():
    found = compare(
        lambda batch: batch.pixels_NHWC.numpy()[:, :3],
        lambda batch: batch.pixels_NHWC.numpy()[:, 3:],
        batches(np.hstack([A, B]), LABELS),
    )
    assert (found.a.correct[0], found.b.correct[0], found.agreed, found.seen) == (3, 2, 3, 4)
    assert found.agreement == 75.0 and found.drop == 25.0 and found.max_difference == 2.0
    # Differences 1; 1 and 1; none; 2: five of twelve logits.
    assert found.mean_difference == pytest.approx((1 + 1 + 1 + 2) / 12)
    assert found.relative_error == pytest.approx(np.sqrt((1 + 1 + 1 + 4) / (10 + 5 + 17 + 25)))
    cosines = [9 / np.sqrt(10 * 9), 4 / np.sqrt(5 * 5), 1, 25 / np.sqrt(25 * 29)]
    assert found.cosine == pytest.approx(np.mean(cosines))
    assert found.timed == 1  # the second batch


def test_background_columns_are_left_out_and_labels_are_those_of_a():
    with_background = np.hstack([np.full((4, 1), 9, np.float32), B])
    both = np.hstack([A, with_background])
    found = compare(
        lambda batch: batch.pixels_NHWC.numpy()[:, :3],
        lambda batch: batch.pixels_NHWC.numpy()[:, 3:],
        batches(both, LABELS),
        (0, 1),
    )
    assert found.agreed == 3 and found.max_difference == 2.0 and found.b.correct[0] == 0
    swapped = compare(
        lambda batch: batch.pixels_NHWC.numpy()[:, 3:],
        lambda batch: batch.pixels_NHWC.numpy()[:, :3],
        batches(both, LABELS + 1),
        (1, 0),
        1,
    )
    assert swapped.agreed == 3 and swapped.a.correct[1] == found.b.correct[1] and swapped.b.correct[0] == 3


def test_the_sums_do_not_depend_on_the_batches():
    one, many = Comparison(), Comparison()
    one.add(A, B, LABELS, (0, 0))
    for i in range(4):
        many.add(A[i : i + 1], B[i : i + 1], LABELS[i : i + 1], (0, 0))
    for name in ("agreed", "max_difference", "mean_difference", "relative_error", "cosine", "drop"):
        assert getattr(one, name) == pytest.approx(getattr(many, name))


@pytest.mark.parametrize(("value", "found"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_logits_that_are_no_numbers_name_the_classifier(value, found):
    bad = B.copy()
    bad[1, 1] = value
    with pytest.raises(RunError, match=f"^B: logits are {found}"):
        Comparison().add(A, bad, LABELS, (0, 0))
