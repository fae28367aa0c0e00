"""Run folders: numbered, never reused, found again. Importing this does not import torch."""

import contextlib
import pathlib

from common.errors import UserError

CONFIG, LOG, METRICS, SUMMARY = "config.json", "log.txt", "metrics.jsonl", "summary.json"
NEWEST, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint.prev.pth.tar", "model_best.pth.tar"
OUTPUT = pathlib.Path("output")


def holds_run(folder):
    """Whether a folder already contains something of a run."""
    names = (CONFIG, LOG, METRICS, SUMMARY, NEWEST, PREVIOUS, BEST)
    return any((pathlib.Path(folder) / name).exists() for name in names)


def numbered_runs(parent):
    """Run folders below `parent` (./output/<name>), oldest first."""
    parent = pathlib.Path(parent)
    return (
        sorted((p for p in parent.glob("[0-9]*") if p.name.isdigit()), key=lambda p: int(p.name))
        if parent.is_dir()
        else []
    )


def new_run(parent):
    """Create the next numbered folder below `parent`; numbers are never used twice, also by two runs at once."""
    number = int(found[-1].name) + 1 if (found := numbered_runs(parent)) else 0
    pathlib.Path(parent).mkdir(parents=True, exist_ok=True)
    while True:
        folder = pathlib.Path(parent) / f"{number:05d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def newest_best():
    """Path of ./model_best.pth.tar, else of the newest one below ./output.

    Raises:
      UserError: there is none.
    """
    if pathlib.Path(BEST).exists():
        return pathlib.Path(BEST)
    found = sorted(OUTPUT.glob(f"*/*/{BEST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no {BEST} here and none below ./output; name a checkpoint file")
    return found[-1]
