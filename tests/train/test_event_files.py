"""--tensorboard: event files hold what metrics.jsonl holds, also of resumed runs, and change nothing else."""

import sys
import types

import numpy as np
import pytest
from support import final, metrics_of, run_differences
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tiny import PROGRAM

from common.errors import UserError
from common.train.event_files import EventFiles

SCALARS = {
    "train": {"loss", "acc1", "lr", "fps"},
    "val": {"loss", "acc1", "acc5"},
    "lr_find": {"loss", "lr", "smoothed"},
}


def train(images, folder, *options):
    PROGRAM.main(["--data", str(images), "--output-dir", str(folder), "--label-smoothing=0", *options])
    return folder


def curves(folder):
    """{kind: {scalar: [(step, value)]}} as TensorBoard shows them."""
    found = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(path)).Reload()
        found[path.name] = {
            name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
        }
    return found


def recorded(folder):
    """The same of metrics.jsonl; an epoch has five steps."""
    found = {}
    for record in metrics_of(folder):
        step = record["step"] + 5 * (record.get("epoch", 1) - 1)
        for name in SCALARS[record["kind"]]:
            value = float(np.float32(record[name]))
            found.setdefault(record["kind"], {}).setdefault(name, []).append((step, value))
    return found


@pytest.fixture(autouse=True)
def _files_sort_by_time(monkeypatch):
    """Event files are read in the order of their names: second, process, number. Here all are of one process."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    return train(images, tmp_path_factory.mktemp("whole") / "run", "--epochs=3", "--lr-find", "--tensorboard")


def test_event_files_hold_the_metrics(whole):
    found = curves(whole)
    assert found == recorded(whole)
    assert {kind: set(scalars) for kind, scalars in found.items()} == SCALARS
    assert [step for step, _ in found["train"]["lr"]] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert [step for step, _ in found["val"]["acc1"]] == [5, 10, 15]


def test_the_run_is_the_one_without(images, whole, tmp_path):
    plain = train(images, tmp_path / "plain", "--epochs=3", f"--lr={final(whole)['found']['lr']}")
    assert run_differences(whole, plain) == [] and not (plain / "tensorboard").exists()


def test_a_resumed_run_continues_without_double_steps(images, whole, tmp_path):
    """It was killed at step 13, its last checkpoint is of step 7: the steps since and two validations come again."""
    words, lr = ("--epochs=3", "--tensorboard", "--save-every=2", "--keep-last=9"), final(whole)["found"]["lr"]
    part = train(images, tmp_path / "part", *words, "--max-steps=13", f"--lr={lr}")
    assert [step for step, _ in curves(part)["train"]["loss"]] == [2, 4, 5, 7, 9, 10, 12]
    assert [step for step, _ in curves(part)["val"]["loss"]] == [5, 10, 13]
    train(images, part, *words, "--resume", str(next(part.glob("checkpoint-*7.pth.tar"))), f"--lr={lr}")
    found, expected = curves(part), curves(whole)
    for kind in ("train", "val"):
        for name in SCALARS[kind] - {"fps"}:
            assert found[kind][name] == expected[kind][name]


def steps_of(folder, state, values):
    setup = types.SimpleNamespace(plan=types.SimpleNamespace(steps_per_epoch=5), state=state)
    events = EventFiles(folder, setup)
    for kind, epoch, step in values:
        events.add(dict(kind=kind, epoch=epoch, step=step, loss=1.0))
    events.close()
    return {kind: [step for step, _ in scalars["loss"]] for kind, scalars in curves(folder).items()}


@pytest.mark.parametrize(
    ("state", "train_steps", "val_steps"),
    [
        (dict(epoch=0, step=3), [2, 9, 15], [9, 15]),
        (dict(epoch=1, step=0), [2, 4, 5, 9, 15], [5, 9, 15]),
        (dict(epoch=0, step=5), [2, 4, 5, 9, 15], [9, 15]),  # stopped in the validation, which comes again
        (None, [9, 15], [9, 15]),  # it had no checkpoint: the run begins anew
    ],
)
def test_what_is_dropped_by_hand(tmp_path, state, train_steps, val_steps):
    """An earlier process was at step 7 and had validated step 5."""
    before = [("train", 1, 2), ("train", 1, 4), ("train", 1, 5), ("val", 1, 5), ("train", 2, 2), ("bad_image", 1, 1)]
    assert steps_of(tmp_path, None, before) == {"train": [2, 4, 5, 7], "val": [5]}
    after = [(kind, epoch, step) for kind in ("train", "val") for epoch, step in ((2, 4), (3, 5))]
    assert steps_of(tmp_path, state, after) == {"train": train_steps, "val": val_steps}


def test_a_missing_package_is_named_before_the_run(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError) as error:
        PROGRAM.prepare(*PROGRAM.parse(["--data", str(images), "--output-dir", str(tmp_path / "run"), "--tensorboard"]))
    assert str(error.value) == "--tensorboard: the package tensorboard is not installed; pip install tensorboard"
    PROGRAM.prepare(*PROGRAM.parse(["--data", str(images), "--output-dir", str(tmp_path / "run")]))


def test_a_full_disk_is_reported_once_and_the_run_goes_on(images, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    train(images, tmp_path / "run", "--epochs=1", "--tensorboard")
    message = (
        f"{tmp_path / 'run' / 'tensorboard'}: cannot be written (No space left on device); the run goes on without\n"
    )
    assert capsys.readouterr().err == message and len(metrics_of(tmp_path / "run")) == 4
