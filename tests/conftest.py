"""Shared fixtures: small image folders, and programs run as a user runs them."""

import os
import pathlib
import subprocess
import sys

import pytest

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1]), str(pathlib.Path(__file__).resolve().parent)]

from support import REAL_DATA, draw_images, forked

from common.environment import set_torch_defaults

set_torch_defaults()  # before any test module imports torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "realdata" in item.keywords and not REAL_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason="no folder ../shared/data with photographs"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Indexes of test data do not belong into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Dataset root: 3 classes, 60 training and 21 validation images. Read only."""
    root = tmp_path_factory.mktemp("images")
    draw_images(root / "train", ("ant", "bee", "cat"), 20)
    draw_images(root / "val", ("ant", "bee", "cat"), 7, seed=1)
    return root


@pytest.fixture
def run(tmp_path):
    """run(*words, check=0) -> CompletedProcess: runs a program in an empty folder, asserts its exit status.

    A Python program is forked, except where the time it takes to start counts.
    """

    def start(*words, check=0, cwd=tmp_path, env=None, timeout=240, fork=True):
        words = [str(word) for word in words]
        environment = {**os.environ, "PYTHON": sys.executable, **(env or {})}
        if fork and words[0].endswith(".py"):
            done = forked(words, cwd, environment, timeout)
        else:
            program = {".py": [sys.executable], ".sh": ["bash"]}.get(pathlib.Path(words[0]).suffix, [])
            done = subprocess.run(
                [*program, *words], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment
            )
        assert check is None or done.returncode == check, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return start
