"""--batch-size auto and --lr-find: what is found, and that a run with it is the run that was given it."""

import dataclasses
import json
import math
import mmap

import pytest
import torch
from support import LAUNCH_TINY, final, metrics_of, run_differences
from tiny import PROGRAM

from common.device import memory
from common.device.device import Device
from common.distributed import Group, World
from common.errors import UserError
from common.train import tuner
from xception.train import PROGRAM as XCEPTION

MEBI = 2**20


def train(images, folder, *options):
    PROGRAM.main(["--data", str(images), "--output-dir", str(folder), "--epochs=2", *options])
    return folder


@pytest.fixture(scope="module")
def tuned(images, tmp_path_factory):
    return train(images, tmp_path_factory.mktemp("tuned") / "run", "-b", "auto", "--lr-find")


def test_a_run_that_found_its_values_is_the_run_that_was_given_them(images, tuned, tmp_path):
    found = json.loads((tuned / "config.json").read_text())["found"]
    assert found["batch_size"] == 6  # ten steps of 60 images
    given = train(images, tmp_path / "given", "-b", "6", f"--lr={found['lr']}")
    assert run_differences(tuned, given) == []


def test_the_curve_is_logged_and_its_lowest_loss_gives_the_rate(tuned):
    curve = [record for record in metrics_of(tuned) if record["kind"] == "lr_find"]
    rates = [record["lr"] for record in curve]
    assert rates[0] == pytest.approx(1e-5) and len(rates) <= 100
    assert all(b / a == pytest.approx(10 ** (6 / 99)) for a, b in zip(rates, rates[1:], strict=False))
    average, smoothed = 0.0, []
    for n, record in enumerate(curve, 1):
        average = 0.9 * average + 0.1 * record["loss"]
        smoothed.append(average / (1 - 0.9**n))
    assert smoothed == pytest.approx([record["smoothed"] for record in curve])
    lowest = rates[smoothed.index(min(smoothed))]
    assert final(tuned)["config"]["lr"] == pytest.approx(lowest / 10, rel=0.05)  # of two digits


@pytest.mark.parametrize("words", [["-b", "auto", "--lr-find"], []])
def test_a_resumed_run_keeps_what_was_found(images, tuned, tmp_path, monkeypatch, words):
    part = train(images, tmp_path / "part", "-b", "auto", "--lr-find", "--max-steps=13")
    for name in ("micro_batch_size", "learning_rate"):
        monkeypatch.setattr(tuner, name, None)
    train(images, part, "--resume=auto", *words)
    assert run_differences(tuned, part) == [] and final(part)["found"] == final(tuned)["found"]


def test_two_ranks_find_the_same(images, run, tmp_path):
    keys = [f"--data_path={images}", "--device=cpu", "--devices=2", f"--output_dir={tmp_path / 'two'}"]
    out = run(*LAUNCH_TINY, *keys, "--batch_size=auto", "--", "--lr-find", "--epochs=1", "--tensorboard").stdout
    assert "--batch-size auto: 3 images per device and micro-batch; " in out
    assert len(list((tmp_path / "two").glob("tensorboard/*/*"))) == 3  # rank 0 alone writes; three kinds of records
    found, lines = final(tmp_path / "two")["found"], [line for line in out.splitlines() if "--lr-find: 0" in line]
    assert found["batch_size"] == 6 and len(lines) == 1 and lines[0].startswith(f"--lr-find: {found['lr']:g}, a tenth")


@pytest.mark.parametrize(
    ("fixed", "per_image", "budget", "expected", "sizes"),
    [
        (500, 32, 2000, 46, [4, 8, 16, 32]),  # 500 + 46 * 32 = 1972; 64 images might take too much
        (500, 32, 9000, 265, [4, 8, 16, 32, 64]),  # 60 images take 1920 MiB: enough to tell
        (500, 1, 2000, 1500, [4, 8, 16, 32, 64, 128, 256]),
        (500, 32, 500, 2, [4, 8]),  # never fewer than batch norm needs
    ],
)
def test_memory_is_linear_in_the_images(fixed, per_image, budget, expected, sizes):
    measured = []

    def peak(images):
        measured.append(images)
        return (fixed + per_image * images) * MEBI

    assert tuner._fitting(peak, budget * MEBI) == expected
    assert measured == sizes and (fixed + per_image * measured[-1] < budget or measured == [4, 8])


def test_a_step_on_the_accelerator_proves_the_size(images, monkeypatch):
    """Memory for 100 images, by the measurement for 120: seven eighths of it are tried."""
    tried = []

    class Trial:
        memory = dataclasses.make_dataclass("Memory", [("budget", float, 3880.0 * MEBI)])()

        def __init__(self, setup, group):
            self.close = lambda: None

        def peak(self, count):
            tried.append(count)
            if count > 100:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return (40 + 32 * count) * MEBI

    monkeypatch.setattr(tuner, "_Trial", Trial)
    setup = PROGRAM.prepare(*PROGRAM.parse(["--data", str(images), "-b", "auto"]))
    setup = dataclasses.replace(setup, plan=dataclasses.replace(setup.plan, num_images=10**6))
    monkeypatch.setattr(Device, "describe", lambda self: "cuda:0")
    size, note = tuner.micro_batch_size(setup, Group(World(), Device("meta")))
    assert (size, tried) == (88, [4, 8, 16, 32, 64, 120, 104, 88])
    assert note == "--batch-size auto: 88 images per device and micro-batch; 88 fit in 3.8 GiB of cuda:0"


def test_images_of_a_device_or_of_a_machine(images, tmp_path):
    config, _ = PROGRAM.parse(["--data", "d", "--accumulate=3"])
    assert PROGRAM.batch_size_of(config, 8, 2) == 48
    config, _ = XCEPTION.parse(["--dataset_path", "d", "--accumulate=3", "--device_target=CPU"])
    assert XCEPTION.batch_size_of(config, 8, 2) == 24


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr-find", "--lr=0.1"], "--lr-find: finds --lr, which is given (0.1); leave one of them out"),
        (["-b", "many"], "--batch-size: invalid int value: 'many'"),
        (["-b", "0"], "--batch-size: 0, must be at least 1, or auto"),
    ],
)
def test_mistakes_are_named(images, words, message):
    with pytest.raises(UserError) as error:
        PROGRAM.prepare(*PROGRAM.parse(["--data", str(images), *words]))
    assert str(error.value) == message


def test_a_rate_is_not_sought_for_a_run_that_has_one(images, tmp_path):
    folder = train(images, tmp_path / "run", "--max-steps=1")
    with pytest.raises(UserError, match="--lr-find: auto was trained with --lr 0.1; keep it, or start a new run"):
        words = ["--data", str(images), "--output-dir", str(folder), "--resume=auto", "--lr-find"]
        PROGRAM.prepare(*PROGRAM.parse(words))


def test_a_loss_that_never_falls_is_an_error(images, tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "_range_test", lambda trainer, steps: [1.0, 1.1, 1.2])
    with pytest.raises(SystemExit) as end:
        train(images, tmp_path / "run", "--lr-find")
    assert end.value.code == 2


def test_the_limit_of_a_control_group_bounds_the_memory(tmp_path):
    for folder, limit, used, cached in (("", "max", 10, 0), ("job", 1000, 300, 50), ("job/step", 5000, 300, 50)):
        group = tmp_path / folder
        group.mkdir(exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    assert memory._free_below_limits("0::/job/step\n", tmp_path) == 750
    assert memory._free_below_limits("0::/elsewhere\n", tmp_path) == math.inf
    (tmp_path / "memory").mkdir()
    for name, value in (("limit_in_bytes", 900), ("usage_in_bytes", 500), ("stat", "inactive_file 100")):
        (tmp_path / "memory" / f"memory.{name}").write_text(str(value))
    assert memory._free_below_limits("4:memory:/docker/1\n0::/\n", tmp_path) == 500


def test_the_peak_of_the_memory_is_measured():
    meter = memory.MemoryMeter(Device("cpu"), processes=1)
    held = memory._fields("/proc/self/status")["VmRSS"]
    assert meter.budget > held > 2**26
    meter.start()
    with mmap.mmap(-1, 2**26) as block:
        for _ in range(64):
            block.write(b"1" * 2**20)
    assert 0.9 * 2**26 < meter.peak() - held < 2**27  # the kernel counts pages in batches
    meter.start()
    assert meter.peak() - held < 2**25
    half = memory.MemoryMeter(Device("cpu"), processes=2)
    assert half.budget - held == pytest.approx((meter.budget - held) / 2, rel=0.2)
