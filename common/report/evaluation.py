"""Per-class counts, confused pairs and most confident mistakes of a predictions file. Needs numpy only."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.evaluation import predictions
from common.evaluation.predictions import Row
from common.files import StrPath

MATRIX_CLASSES = 20  # up to here the confusion matrix is shown whole
MOST_PAIRS = 200


def summarize(path: StrPath, num_mistakes: int, picture: Callable[[str], str | None]) -> dict[str, Any]:
    """What the report shows of a predictions file.

    Args:
      num_mistakes: wrong guesses to show as pictures.
      picture: path of an image -> data: URI, or None where it cannot be read.
    Returns:
      dict of `images`, `correct`, `correct5`: labeled images that decode, and the hits among them; `failed` and
      `unlabeled`: other rows; `classes`: names of the classes that occur; `per_class`: [images, correct, times it was
      the first guess] of each; `pairs`: [truth, guess, images] of wrong guesses as positions in `classes`, the most
      frequent first, at most MOST_PAIRS of `all_pairs` unless `matrix`; `mistakes`; `names` of their classes.
    Raises:
      UserError: not a predictions file.
    """
    rows, failed, unlabeled = list[Row](), 0, 0
    for row in predictions.read(path):
        failed += bool(row.error)
        unlabeled += not row.error and row.label_index is None
        if not row.error and row.label_index is not None:
            rows.append(row)
    first = [row.best[0] for row in rows]
    names = {guess.index: guess.name for guess in first} | {row.label_index: row.label for row in rows}
    indices = sorted(index for index in names if index is not None)
    position = {index: i for i, index in enumerate(indices)}
    truths = np.array([position[row.label_index] for row in rows if row.label_index is not None], np.int64)
    guesses = np.array([position[guess.index] for guess in first], np.int64)
    pairs = _pairs(truths, guesses, len(indices))
    is_matrix = len(indices) <= MATRIX_CLASSES
    wrong = sorted((row for row in rows if row.rank != 0), key=lambda row: (-row.best[0].probability, row.path))
    mistakes = [_mistake(row, picture) for row in wrong[:num_mistakes]]
    counts = [np.bincount(each, minlength=len(indices)) for each in (truths, truths[truths == guesses], guesses)]
    return {
        "source": str(path),
        "images": len(rows),
        "correct": sum(row.rank == 0 for row in rows),
        "correct5": sum(row.rank is not None for row in rows),
        "failed": failed,
        "unlabeled": unlabeled,
        "classes": [names[index] for index in indices],
        "per_class": np.stack(counts, axis=1).tolist(),
        "pairs": pairs if is_matrix else pairs[:MOST_PAIRS],
        "all_pairs": len(pairs),
        "matrix": is_matrix,
        "mistakes": mistakes,
        "names": {
            str(index): name for index, name in itertools.chain(names.items(), *map(_names, wrong[:num_mistakes]))
        },
    }


def _pairs(truths: np.ndarray, guesses: np.ndarray, num_classes: int) -> list[list[int]]:
    wrong = truths != guesses
    keys, counts = np.unique(truths[wrong] * num_classes + guesses[wrong], return_counts=True)
    order: Sequence[int] = np.lexsort((keys, -counts)).tolist()
    return [[int(keys[i]) // num_classes, int(keys[i]) % num_classes, int(counts[i])] for i in order]


def _names(row: Row) -> list[tuple[int | None, str | None]]:
    return [(guess.index, guess.name) for guess in row.best]


def _mistake(row: Row, picture: Callable[[str], str | None]) -> dict[str, Any]:
    return {
        "path": row.path,
        "label": row.label_index,
        "best": [[guess.index, guess.probability] for guess in row.best],
        "truth": next((guess.probability for guess in row.best if guess.index == row.label_index), None),
        "picture": picture(row.path),
        "heat": None,
    }
