"""Fixtures for all tests: a small data set, and programs run as a user runs them."""

import signal

import pytest

pytest.register_assert_rewrite("support")

from support import REAL_DATA, draw_images, run_program

from common.environment import set_torch_defaults

set_torch_defaults()  # before any test module imports torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "realdata" in item.keywords and not REAL_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason="no folder ../shared/data with photographs"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Indexes of test data stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture
def foreground_signals():
    """Signals that nohup and `&` make a process ignore, with its children, have their default actions."""
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGQUIT: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, action) for number, action in defaults.items()}
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Dataset root: 3 classes, 60 training and 21 validation images. Read only."""
    root = tmp_path_factory.mktemp("images")
    draw_images(root / "train", ("ant", "bee", "cat"), 20)
    draw_images(root / "val", ("ant", "bee", "cat"), 7, seed=1)
    return root


@pytest.fixture(scope="session")
def weights(images, tmp_path_factory):
    """Checkpoint of the tiny network after one epoch of `images`, statistics included. Read only."""
    import tiny

    folder = tmp_path_factory.mktemp("weights") / "run"
    tiny.PROGRAM.main(["--data", str(images), "--output-dir", str(folder), "--epochs=1"])
    return folder / "model_best.pth.tar"


@pytest.fixture
def run(tmp_path):
    """support.run_program in an empty folder."""

    def start(*words, cwd=tmp_path, **options):
        return run_program(*words, cwd=cwd, **options)

    return start
