"""Exact accuracy by hand."""

import numpy as np
import pytest

from common.evaluation.metrics import Counts, label_ranks, smoothed_losses
from common.evaluation.metrics_json import format_table


def test_rank_is_the_position_and_ties_go_to_the_lower_index():
    logits = [[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [5.0, 5.0, 5.0], [0.0, -1.0, 7.0]]
    assert label_ranks(logits, [2, 0, 2, 1]).tolist() == [1, 0, 2, 2]


def test_counts_of_four_images_with_known_ranks():
    logits = np.array([[9, 8, 7, 6, 5, 4], [8, 9, 7, 6, 5, 4], [4, 8, 9, 6, 5, 7], [0, 1, 2, 3, 4, 5]], float)
    counts = Counts()
    counts.add(logits[:1], [0])
    counts.add(logits[1:], [0, 4, 0])  # ranks 1, 4, 5
    assert counts.correct.tolist() == [1, 2, 2, 2, 3]
    assert counts.seen == 4
    assert (counts.percent(1), counts.percent(5)) == (25.0, 75.0)


def test_top_k_beyond_the_class_count_counts_every_image():
    counts = Counts()
    counts.add([[0.0, 1.0], [1.0, 0.0]], [0, 0])
    assert counts.correct.tolist() == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(("num_classes", "printed"), [(2, [1]), (3, [1, 2]), (5, [1, 2, 3, 4]), (6, [1, 2, 3, 4, 5])])
def test_accuracies_that_count_every_image_are_not_printed(num_classes, printed):
    counts = Counts()
    counts.add(np.eye(num_classes), np.zeros(num_classes, int))
    assert ("Acc@5" in str(counts)) == (num_classes >= 6) and "Acc@1 " in str(counts)
    assert [int(line[3]) for line in format_table(counts).splitlines()] == printed


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [([[0.0, 1.0]], [2], "outside"), ([[0.0, 1.0]], [0, 1], "fit"), ([[0.0, 1.0], [0.0, np.nan]], [0, 1], "row 1")],
)
def test_impossible_input_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        label_ranks(logits, labels)


def test_smoothed_loss_by_hand():
    # log-softmax of (ln 1, ln 1, ln 2) is (ln 1/4, ln 1/4, ln 1/2)
    losses = smoothed_losses(np.log([[1.0, 1.0, 2.0]]), [2], 0.3)
    assert losses[0] == pytest.approx(0.7 * np.log(2) + 0.3 * (np.log(4) + np.log(4) + np.log(2)) / 3, abs=1e-12)
