"""Run folders: numbered and never reused. Importing this does not import torch."""

import contextlib
import json
import pathlib

from common.errors import UserError
from common.files import StrPath

CONFIG, LOG, METRICS, SUMMARY = "config.json", "log.txt", "metrics.jsonl", "summary.json"
NEWEST, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint.prev.pth.tar", "model_best.pth.tar"
CHECKPOINTS = (NEWEST, PREVIOUS, BEST)
OUTPUT = pathlib.Path("output")


def holds_run(folder: StrPath) -> bool:
    """Whether a folder contains a file of a run."""
    names = (CONFIG, LOG, METRICS, SUMMARY, *CHECKPOINTS)
    return any((pathlib.Path(folder) / name).exists() for name in names)


def numbered_runs(parent: StrPath) -> list[pathlib.Path]:
    """Run folders below `parent` (./output/NAME), oldest first."""
    return sorted((p for p in pathlib.Path(parent).glob("[0-9]*") if p.name.isdigit()), key=lambda p: int(p.name))


def new_run(parent: StrPath) -> pathlib.Path:
    """Create the next numbered folder below `parent`; two runs that start at once get two numbers."""
    number = int(found[-1].name) + 1 if (found := numbered_runs(parent)) else 0
    pathlib.Path(parent).mkdir(parents=True, exist_ok=True)
    while True:
        folder = pathlib.Path(parent) / f"{number:05d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def newest_best(network: str) -> pathlib.Path:
    """Path of ./model_best.pth.tar, else of the newest one of a network below ./output.

    Raises:
      UserError: there is none.
    """
    if pathlib.Path(BEST).exists():
        return pathlib.Path(BEST)
    found = [path for path in OUTPUT.glob(f"*/*/{BEST}") if _network(path.parent) in (network, "")]
    if not found:
        raise UserError(f"no {BEST} here and none of {network} below ./output; name a checkpoint file")
    return max(found, key=lambda path: path.stat().st_mtime)


def _network(folder: pathlib.Path) -> str:
    """Name of the network that a run trained; empty where that is not known."""
    try:
        return str(json.loads((folder / CONFIG).read_text())["arch"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""
