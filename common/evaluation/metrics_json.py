"""Accuracies as metrics.json, in the structure that the published postprocessing writes, and as a printed table."""

import json
import os
from collections.abc import Mapping

from common.errors import UserError
from common.evaluation.metrics import TOP_K, Counts
from common.files import write_atomic


def write_metrics(path: str, counts: Counts, num_outputs: int, further: Mapping[str, str] | None = None) -> None:
    """Write metrics.json; `num_outputs` counts a background class too, `further` are pairs to append."""
    pairs = {"Number of images": str(counts.seen), "Number of classes": str(num_outputs)}
    pairs |= {f"Top{k} accuracy": f"{counts.percent(k):.2f}%" for k in range(1, TOP_K + 1)}
    pairs |= further or {}
    content = {
        "title": "Overall statistical evaluation",
        "value": [{"key": key, "value": value} for key, value in pairs.items()],
    }
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        write_atomic(path, json.dumps(content) + "\n")
    except OSError as error:
        raise UserError(f"--metrics-json: {path} cannot be written ({error.strerror})") from error


def format_table(counts: Counts) -> str:
    """Percent and hits for top-1..top-5, one line each; without those that count every image."""
    lines = [
        f"top{k}  {counts.percent(k):6.2f} %  ({int(counts.correct[k - 1])} of {counts.seen} images)"
        for k in counts.printed_k
    ]
    if counts.skipped:
        lines.append(f"{counts.skipped} labelled images have no result and are not counted")
    return "\n".join(lines)
