"""Starting, signals and exit statuses of several ranks through the launcher."""

import os
import signal
import subprocess

import pytest
from support import (
    LAUNCH_TINY,
    TINY,
    all_gone,
    background,
    final,
    processes_naming,
    run_differences,
    stopped_at,
    wait_until,
)

OPTIONS = ["--print-freq=1", "--save-every=2", "--epochs=4", "--ema=0.9", "--accumulate=3"]


def launch(images, folder, *keys, options=OPTIONS):
    return [
        *LAUNCH_TINY,
        f"--data_path={images}",
        "--device=cpu",
        "--batch_size=12",
        "--devices=2",
        f"--output_dir={folder}",
        *keys,
        "--",
        *options,
    ]


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert background(os.sys.executable, *launch(images, folder), cwd=folder.parent).wait(timeout=120) == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_ranks_stop_without_a_process_left_and_continue_to_the_same_bits(images, undisturbed, tmp_path, number):
    folder = tmp_path / "run"
    words = [os.sys.executable, *launch(images, folder, "--resume=auto")]
    status = stopped_at(background(*words, cwd=tmp_path), folder, number, after_steps=7)
    assert status == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert all_gone(folder), "a rank outlived its launcher"
    stopped = final(folder)
    assert (stopped["epoch"], stopped["step"]) < (4, 0)
    assert background(*words, cwd=tmp_path).wait(timeout=120) == 0
    assert run_differences(undisturbed, folder) == []


def test_a_signal_to_every_process_of_a_job_is_a_signal_to_the_trainer(images, tmp_path):
    """Schedulers and `timeout` also signal dataloader workers, which must not end first."""
    folder = tmp_path / "run"
    words = [
        str(w)
        for w in (
            os.sys.executable,
            TINY,
            "--data",
            images,
            "--output-dir",
            folder,
            "--workers=2",
            "--print-freq=1",
            "--epochs=1000",
        )
    ]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, start_new_session=True, text=True, **pipes)
    wait_until((folder / "metrics.jsonl").exists, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and errors == ""
    assert (folder / "checkpoint.pth.tar").exists() and all_gone(folder)


def test_a_killed_rank_ends_the_run_with_its_signals_status(images, tmp_path):
    folder = tmp_path / "run"
    process = background(os.sys.executable, *launch(images, folder, options=[*OPTIONS, "--epochs=500"]), cwd=tmp_path)
    wait_until((folder / "metrics.jsonl").exists, process)
    victim = max(pid for pid in processes_naming(folder) if pid != process.pid)
    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=120) == 128 + signal.SIGKILL
    assert all_gone(folder)
