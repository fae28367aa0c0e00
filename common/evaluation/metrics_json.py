"""Accuracies as the published metrics.json, and as lines for people."""

import json

from common.errors import UserError
from common.evaluation.metrics import TOP_K
from common.files import write_atomic


def write_metrics(path, counts, columns):
    """Write the accuracies in the structure of the published metrics.json, whole or not at all."""
    pairs = {"Number of images": str(counts.seen), "Number of classes": str(columns)}
    for k in range(1, TOP_K + 1):
        pairs[f"Top{k} accuracy"] = f"{counts.percent(k):.2f}%"
    content = {
        "title": "Overall statistical evaluation",
        "value": [{"key": key, "value": value} for key, value in pairs.items()],
    }
    try:
        write_atomic(path, json.dumps(content) + "\n")
    except OSError as error:
        raise UserError(f"--metrics-json: {path} cannot be written ({error.strerror})") from error


def table(counts):
    """The accuracies as lines for people: hits, images and percent for top-1..top-5."""
    lines = [
        f"top{k}  {counts.percent(k):6.2f} %  ({int(counts.correct[k - 1])} of {counts.seen} images)"
        for k in range(1, TOP_K + 1)
    ]
    if counts.skipped:
        lines.append(f"{counts.skipped} labelled images have no result and are not counted")
    return "\n".join(lines)
