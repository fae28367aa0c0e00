"""The models of this repository: the folders that hold a train.py. As a program, prints their names.

python tools/models.py
"""

import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.train.program import TrainProgram


def names() -> list[str]:
    """Folder names of all models, sorted."""
    return sorted(path.parent.name for path in pathlib.Path(__file__).resolve().parents[1].glob("*/train.py"))


def program(name: str) -> TrainProgram:
    """The training program of a model; `.spec` is its ModelSpec. Does not import torch."""
    return importlib.import_module(f"{name}.train").PROGRAM


if __name__ == "__main__":
    print(*names(), sep="\n")
