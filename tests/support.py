"""Where things are, small images, programs without the seconds of importing torch, and how a mistake looks."""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
TINY = ROOT / "tests" / "tiny.py"
LAUNCH_TINY = [
    ROOT / "common" / "launch" / "launch.py",
    "tiny",
    TINY,
    "--",
    "--",
]  # the user's keys follow, then -- and options


def draw_images(folder, classes, per_class, size=40, seed=0):
    """JPEGs whose class shows as a brightness and a stripe width; names sort in drawing order."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            rng = np.random.default_rng((seed, label, number))
            stripes = (np.arange(size) // (2 + 2 * label)) % 2 * 120
            pixels = rng.integers(0, 100, (size, size + number % 3, 3)) + stripes[:, None, None]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:04d}.jpg", quality=90)


# Importing torch takes longer than most programs of the tests: it is done once, in a process that forks for each.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torchvision"])


def _as_main(words, cwd, env, outputs):
    """What the interpreter does with `python WORDS`."""
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # a forked program's loaders: as in one of its own
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:1] = [os.path.dirname(words[0]), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def forked(words, cwd, env, timeout=240):
    """subprocess.run of a Python program, its output captured, in a process that has torch loaded."""
    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
        process = _FORKS.Process(target=_as_main, args=(words, cwd, env, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in outputs))


def user_error(done):
    """The single line of a mistake: `error: ...` on stderr, nothing else there, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0][len("error: ") :]
