"""Where things are, programs without the seconds that torch takes to be imported, and how a mistake looks."""
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"

# Importing torch takes longer than most programs of the tests: it is done once, in a process that forks for each.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["common", "torch", "torch._dynamo", "torchvision"])


def _as_main(words, cwd, environment):
    """What the interpreter does with `python WORDS`, in a forked process; its output goes to files in the folder."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")


def forked(words, cwd, environment, timeout, folder):
    """subprocess.run of a Python program, without the seconds that an interpreter takes to import torch."""
    before = os.getcwd()
    os.chdir(folder)
    process = _FORKS.Process(target=_as_main, args=(words, cwd, environment))
    process.start()
    os.chdir(before)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise subprocess.TimeoutExpired(words, timeout)
    output = [(folder / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, process.exitcode, *output)


def user_error(done):
    """The single line of a mistake: `error: ...` on stderr, nothing else there, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0][len("error: ") :]
