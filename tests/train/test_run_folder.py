"""A run folder belongs to one process at a time, whichever way that ends."""

import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from support import LAUNCH_TINY, TINY, background, fails, user_error, wait_until
from tiny import PROGRAM

from common.errors import UserError
from common.train import run_setup

ALWAYS = "--epochs=100000"


def setup_of(folder, resume="", state=None, machines=None):
    """What `claimed_folder` reads of a RunSetup."""
    return SimpleNamespace(
        config=SimpleNamespace(output_dir=str(folder), resume=resume, machines=machines), state=state
    )


def claimed(folder, **options):
    return run_setup.claimed_folder(setup_of(folder, **options))


def test_of_runs_that_start_at_once_exactly_one_gets_the_folder(tmp_path):
    for i in range(20):
        barrier, end = threading.Barrier(4), threading.Event()

        def claim(folder, barrier=barrier, end=end):
            barrier.wait()
            try:
                with claimed(folder):
                    end.wait()
                    return "won"
            except UserError as error:
                return str(error)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(claim, tmp_path / f"run{i}") for _ in range(4)]
            while sum(future.done() for future in futures) < 3:
                time.sleep(0.001)
            end.set()
        *refused, winner = sorted(future.result() for future in futures)
        remedy = "choose another folder, or start it again there, as it has no checkpoint, with --resume auto"
        refusal = f"already holds a run; {remedy}"
        assert winner == "won" and refused == 3 * [f"--output-dir: {tmp_path}/run{i} {refusal}"]


def test_a_run_that_started_after_the_check_is_refused_in_one_line(images, tmp_path, monkeypatch, capfd):
    prepare, folder = PROGRAM.prepare, tmp_path / "run"
    with contextlib.ExitStack() as other:

        def then_claimed(*arguments):
            checked = prepare(*arguments)
            other.enter_context(claimed(folder))
            return checked

        monkeypatch.setattr(PROGRAM, "prepare", then_claimed)
        with pytest.raises(SystemExit, match="2"):
            PROGRAM.main(["--data", str(images), "--output-dir", str(folder)])
        printed = capfd.readouterr()
        assert "already holds a run; choose another folder" in user_error(SimpleNamespace(stderr=printed.err))
        assert printed.out == "" and [path.name for path in folder.iterdir()] == ["log.txt"]


def test_a_resumed_run_does_not_join_one_that_is_alive(tmp_path):
    with claimed(tmp_path), pytest.raises(UserError, match="in use by another run"), claimed(tmp_path, resume="auto"):
        pass
    with claimed(tmp_path, resume="auto"):  # its end frees the folder
        pass


def test_a_run_that_started_and_ended_since_the_check_is_not_overwritten(images, tmp_path):
    PROGRAM.main(["--data", str(images), "--output-dir", str(tmp_path / "run"), "--max-steps=1"])
    with pytest.raises(UserError, match="already holds a run"), claimed(tmp_path / "run", resume="auto"):
        pass


def test_a_killed_process_frees_the_folder_though_its_child_lives(tmp_path):
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        with claimed(tmp_path):
            if not os.fork():  # as a dataloader worker, which ends a moment after its parent
                time.sleep(2)
                os._exit(0)
            os.write(writer, b"!")
            signal.pause()
    os.read(reader, 1)
    with pytest.raises(UserError, match="in use"), claimed(tmp_path, resume="auto"):
        pass
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with claimed(tmp_path, resume="auto"):
        pass


@pytest.mark.parametrize("error", [BlockingIOError, OSError])
def test_locks_that_a_file_system_lacks_or_a_lost_node_left_do_not_end_a_run(tmp_path, monkeypatch, error):
    def flock(*_):
        raise error

    monkeypatch.setattr("fcntl.flock", flock)
    with claimed(tmp_path, resume="auto", machines=3):
        pass


@pytest.mark.parametrize("devices", [1, 2])
def test_resume_auto_beside_a_run_that_is_alive(images, run, tmp_path, devices):
    folder = tmp_path / "run"
    process = background(
        sys.executable, TINY, "--data", images, "--output-dir", folder, "--accumulate=2", ALWAYS, cwd=tmp_path
    )
    try:
        wait_until((folder / "metrics.jsonl").exists, process)
        keys = [f"--data_path={images}", "--device=cpu", f"--output_dir={folder}", f"--devices={devices}"]
        done = run(*LAUNCH_TINY, *keys, "--resume=auto", "--max_restarts=2", "--", ALWAYS, check=2)
        fails(done, f"--output-dir: {folder} is in use by another run; choose another folder, or wait for its end")
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run(TINY, "--data", images, "--output-dir", folder, "--resume=auto", "--max-steps=1")
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match="cannot be written .Is a directory"), claimed(tmp_path, resume="auto"):
        pass
