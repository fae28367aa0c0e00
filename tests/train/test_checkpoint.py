"""Checkpoints: written in the background and atomically; --keep-last and --keep-best; full disks."""

import json
import os
import threading

import pytest
import torch
from support import TINY, final, user_error
from tiny import PROGRAM

from common.config import TrainConfig
from common.errors import UserError
from common.train import checkpoint
from common.weights.load import load_torch

NEWEST, PREVIOUS, BEST = "checkpoint.pth.tar", "checkpoint.prev.pth.tar", "model_best.pth.tar"


def snapshot(step, **facts):
    return checkpoint.Snapshot({"step": step, "epoch": step, "weight": torch.full((1000,), float(step))}, step, **facts)


def step_of(path):
    return load_torch(path)["step"]


def saved(writer, *snapshots):
    for one in snapshots:
        writer.save(one)
        writer.wait()
    return writer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def no_space(folder):
    """The next temporary file of the checkpoint is on a full disk."""
    (folder / f"{NEWEST}.tmp").symlink_to("/dev/full")


def test_training_continues_while_the_file_is_written(tmp_path, monkeypatch):
    let_it_reach_the_disk, fsync = threading.Event(), os.fsync

    def slow_disk(descriptor):
        assert let_it_reach_the_disk.wait(20)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_disk)
    writer = checkpoint.Writer(tmp_path)
    writer.save(snapshot(1))
    assert not (tmp_path / NEWEST).exists(), "save() waited for the disk"
    second = threading.Thread(target=writer.save, args=(snapshot(2),))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "the second one must wait for the first"
    let_it_reach_the_disk.set()
    second.join()
    assert writer.wait() is None
    assert (step_of(tmp_path / NEWEST), step_of(tmp_path / PREVIOUS)) == (2, 1)
    assert names(tmp_path) == [PREVIOUS, NEWEST]


def test_a_full_disk_keeps_the_earlier_files_and_is_reported_once_per_failure(tmp_path):
    said = []
    writer = saved(checkpoint.Writer(tmp_path, warn=said.append), snapshot(1), snapshot(2, is_best=True))
    before = {name: (tmp_path / name).read_bytes() for name in (NEWEST, PREVIOUS, BEST)}
    no_space(tmp_path)
    saved(writer, snapshot(3))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before and names(tmp_path) == sorted(before)
    assert len(said) == 1 and "step 3 cannot be written" in said[0] and "No space left on device" in said[0]
    assert writer.fatal is None and "No space left" in str(writer.wait())
    saved(writer, snapshot(4))
    assert (step_of(tmp_path / NEWEST), len(said), writer.wait()) == (4, 1, None)


def test_best_weights_that_could_not_be_written_are_written_with_the_next_checkpoint(tmp_path):
    writer = saved(checkpoint.Writer(tmp_path, warn=lambda line: None), snapshot(1, is_best=True))
    no_space(tmp_path)
    saved(writer, snapshot(2, is_best=True), snapshot(3))
    assert (step_of(tmp_path / BEST), step_of(tmp_path / NEWEST)) == (2, 3)
    assert names(tmp_path) == [PREVIOUS, NEWEST, BEST]


def test_a_damaged_newest_file_never_replaces_the_one_before_it(tmp_path, monkeypatch):
    saved(checkpoint.Writer(tmp_path), snapshot(1), snapshot(2))
    (tmp_path / NEWEST).write_bytes((tmp_path / NEWEST).read_bytes()[:500])
    found, _ = checkpoint.newest_valid(tmp_path, log=lambda line: None)
    assert found.name == PREVIOUS
    saved(checkpoint.Writer(tmp_path), snapshot(3))
    assert (step_of(tmp_path / NEWEST), step_of(tmp_path / PREVIOUS)) == (3, 1)


def test_the_last_and_the_best_are_kept_also_across_a_resume(tmp_path):
    def writer():
        return checkpoint.Writer(tmp_path, keep_last=3, keep_best=2)

    saved(writer(), snapshot(1, acc1=50.0), snapshot(2, acc1=70.0), snapshot(3, acc1=60.0))
    saved(writer(), snapshot(4, acc1=60.0), snapshot(5, acc1=10.0), snapshot(6))
    assert [step_of(path) for path in checkpoint.kept_last(tmp_path)] == [6, 5, 4]
    assert [step_of(path) for path in checkpoint.kept_best(tmp_path)] == [2, 3], "of equal ones the earlier"
    saved(checkpoint.Writer(tmp_path), snapshot(7))
    assert len(names(tmp_path)) == 3 + 2 + 2, "a run that keeps none deletes none"


def test_where_both_newest_files_are_damaged_a_kept_one_is_used(tmp_path):
    saved(checkpoint.Writer(tmp_path, keep_last=3), snapshot(1), snapshot(2), snapshot(3))
    for name in (NEWEST, PREVIOUS):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b"")
    said = []
    path, state = checkpoint.newest_valid(tmp_path, said.append)
    assert (path.name, state["step"], len(said)) == ("checkpoint-00000003.pth.tar", 3, 2)


@pytest.mark.parametrize(("word", "expected"), [("0", (0, 0)), ("500", (500, 0)), ("10m", (0, 600)), ("0.5m", (0, 30))])
def test_save_every_is_steps_or_minutes(word, expected):
    assert TrainConfig(save_every=word).save_interval == expected


@pytest.mark.parametrize("word", ["-1", "10s", "m", "often"])
def test_save_every_refuses_anything_else(word):
    with pytest.raises(UserError, match=f"--save-every: {word}, must be"):
        TrainConfig(save_every=word)


def test_a_run_saves_after_minutes_and_keeps_what_was_asked_for(images, tmp_path):
    folder = tmp_path / "run"
    PROGRAM.main(
        [
            "--data",
            str(images),
            "--output-dir",
            str(folder),
            "--epochs=2",
            "--save-every=0.00001m",
            "--keep-last=100",
            "--keep-best=1",
        ]
    )
    kept = [int(path.name[11:19]) for path in checkpoint.kept_last(folder)]
    assert kept == list(range(10, 0, -1)), "five steps an epoch, each later than the interval"
    best = checkpoint.kept_best(folder)
    assert [path.read_bytes() for path in best] == [(folder / BEST).read_bytes()]


def test_a_full_disk_does_not_end_a_run_unless_asked(images, run, tmp_path):
    for policy, status in (("continue", 0), ("stop", 1)):
        folder = tmp_path / policy
        folder.mkdir()
        no_space(folder)
        done = run(
            TINY,
            "--data",
            images,
            "--output-dir",
            folder,
            "--epochs=2",
            f"--on-save-error={policy}",
            "--save-every=2",
            check=status,
        )
        if policy == "continue":
            assert done.stdout.count("step 2 cannot be written") == 1
            assert final(folder)["epoch"] == 2
        else:
            assert "No space left on device" in user_error(done) and not (folder / NEWEST).exists()


def test_log_files_on_a_full_disk_do_not_end_a_run(images, run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").symlink_to("/dev/full")
    done = run(TINY, "--data", images, "--output-dir", folder, "--epochs=1", "--resume=auto")
    assert done.stderr.count("log.txt: cannot be written (No space left on device); the run goes on") == 1
    assert [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").read_text().splitlines()][-1] == "val"


def test_a_folder_that_takes_no_files_ends_the_run_with_its_reason(images, run, tmp_path):
    """Stands for a read-only folder: permissions do not restrict root, as whom tests often run."""
    folder = tmp_path / "run"
    (folder / f"{NEWEST}.tmp").mkdir(parents=True)
    done = run(TINY, "--data", images, "--output-dir", folder, "--epochs=1", check=1)
    assert "cannot be written" in user_error(done) and "the run goes on" in done.stdout
