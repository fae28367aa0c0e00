"""The models of this repository: the folders that hold a train.py. As a program, prints their names.

python tools/models.py
"""

import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common.errors import UserError
from common.spec import ModelSpec
from common.train.program import TrainProgram


def names() -> list[str]:
    """Folder names of all models, sorted."""
    return sorted(path.parent.name for path in pathlib.Path(__file__).resolve().parents[1].glob("*/train.py"))


def program(name: str) -> TrainProgram:
    """The training program of a model; `.spec` is its ModelSpec. Does not import torch."""
    return importlib.import_module(f"{name}.train").PROGRAM


def spec(name: str) -> ModelSpec:
    """The ModelSpec that --arch NAME means.

    Raises:
      UserError: there is no such model.
    """
    if name not in names():
        raise UserError(f"--arch: {name}, must be one of {', '.join(names())}")
    return program(name).spec


if __name__ == "__main__":
    print(*names(), sep="\n")
