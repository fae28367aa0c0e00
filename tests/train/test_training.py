"""The trainer on a tiny network: exact resume, any number of ranks, every option has an effect."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from support import LAUNCH_TINY, TINY, user_error
from tiny import PROGRAM, RECIPE

from common import distributed, errors
from common.data import index, loader
from common.device import device
from common.train import program, run_log, run_setup, trainer
from common.weights.load import load_torch

# Everything that draws random numbers or keeps state beside the weights.
EVERYTHING = (
    "--mixup=0.2",
    "--cutmix=0.5",
    "--auto-augment=trivialaugment",
    "--random-erasing=0.3",
    "--color-jitter=0.2",
    "--ema=0.9",
    "--accumulate=2",
    "--lr-schedule=cosine-step",
    "--warm-up-epochs=1",
)


def final(folder):
    return load_torch(folder / "checkpoint.pth.tar")


def differences(a, b, path=""):
    """Names of the entries in which two nested states differ in any bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [name for key in a for name in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list):
        return [name for n, (x, y) in enumerate(zip(a, b, strict=True)) for name in differences(x, y, f"{path}/{n}")]
    return [] if a == b else [path]


def same_training(one, other):
    """Compare what training made: weights, averages, momentum, position, best epoch."""
    keys = ("state_dict", "ema_state_dict", "ema_updates", "optimizer", "epoch", "step", "best_acc1", "best_epoch")
    a, b = final(one), final(other)
    return differences({k: a[k] for k in keys}, {k: b[k] for k in keys})


@pytest.fixture
def train(images, run, tmp_path):
    """train(name, *options, check=0) -> run folder, in a process of its own."""

    def start(name, *options, check=0):
        run(TINY, "--data", images, "--output-dir", tmp_path / name, *options, check=check)
        return tmp_path / name

    return start


def stopped_at(process, folder, number, after_steps):
    """Signal a running training once its metrics show `after_steps` lines; returns its exit status.

    SIGKILL waits for a checkpoint too: it is written beside the steps, and without one the run would start anew.
    """
    deadline = time.monotonic() + 120
    metrics, checkpoint = folder / "metrics.jsonl", folder / "checkpoint.pth.tar"
    while process.poll() is None and time.monotonic() < deadline:
        has_begun = metrics.exists() and len(metrics.read_text().splitlines()) >= after_steps
        if has_begun and (number != signal.SIGKILL or checkpoint.exists()):
            process.send_signal(number)
            break
        time.sleep(0.002)
    return process.wait(timeout=120)


def background(*words, cwd):
    return subprocess.Popen(
        [str(w) for w in words],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHON": sys.executable},
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_continues_to_the_same_bits(images, train, tmp_path, number):
    options = [*EVERYTHING, "--print-freq=1", "--save-every=2", "--epochs=4"]
    whole = train("whole", *options)
    folder = tmp_path / "killed"
    words = [sys.executable, TINY, "--data", images, "--output-dir", folder, *options, "--resume=auto"]
    statuses = [stopped_at(background(*words, "--workers=2", cwd=tmp_path), folder, number, after_steps=3)]
    at_stop = final(folder)
    statuses.append(stopped_at(background(*words, "--workers=1", cwd=tmp_path), folder, number, after_steps=12))
    statuses.append(background(*words, cwd=tmp_path).wait(timeout=120))
    assert statuses[0] == (errors.EXIT_TERMINATED if number == signal.SIGTERM else -signal.SIGKILL)
    assert statuses[-1] == 0
    if number == signal.SIGTERM:
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [(line["epoch"] - 1, line["step"]) for line in steps if line["kind"] == "train"]
        assert (at_stop["epoch"], at_stop["step"]) in last, "it saved a step that it did not just do"
    assert same_training(whole, folder) == []


EXACT = ["--reduce=exact", "--ema=0.9", "--epochs=2", "--print-freq=1", "--resume=auto"]


@pytest.fixture(scope="module")
def one_rank(images, tmp_path_factory):
    """Run folder of one process that does all six micro-batches of a step, two images each."""
    folder = tmp_path_factory.mktemp("one rank") / "run"
    PROGRAM.main(["--data", str(images), f"--output-dir={folder}", *EXACT, "--accumulate=6"])
    return folder


@pytest.mark.parametrize("world_sizes", [(1, 2), (1, 3), (1, 2, 1)])
def test_exact_reduction_gives_the_same_bits_for_any_number_of_ranks(
    images, run, train, tmp_path, one_rank, world_sizes
):
    # The micro-batches are decided by the first process and kept by every later one.
    train("many", *EXACT, "--accumulate=6", "--max-steps=2")
    for n, world_size in enumerate(world_sizes[1:], 1):
        limit = ["--max-steps", str(2 + 3 * n)] if n < len(world_sizes) - 1 else []
        if world_size == 1:
            train("many", *EXACT, *limit)
            continue
        keys = [f"--data_path={images}", f"--devices={world_size}", f"--output_dir={tmp_path / 'many'}"]
        run(*LAUNCH_TINY, *keys, "--", *EXACT, *limit)
    assert same_training(one_rank, tmp_path / "many") == []


def test_two_ranks_see_the_same_images_and_count_every_validation_image(images, run, tmp_path):
    out = run(*LAUNCH_TINY, f"--data_path={images}", "--device=cpu", "--devices=2", "--", "--epochs=1").stdout
    assert "2 rank(s)" in out and "(21 images)" in out
    folder = tmp_path / "output" / "tiny" / "00000"
    evaluated = run(TINY, "--data", images, "--evaluate", "--resume", folder / "model_best.pth.tar").stdout
    printed = next(line for line in out.splitlines() if "Acc@1" in line)
    assert evaluated.splitlines()[-1].split("loss")[0].strip() in printed


def test_batch_norm_statistics_are_the_mean_over_micro_batches(images, train):
    """One step of three micro-batches: the mean of three updates that all start from the initial statistics."""
    folder = train("bn", "--max-steps=1", "--accumulate=3", "--epochs=1")
    from tiny import SPEC

    from common.data import index, loader, sampling, transforms
    from common.device.device import Device
    from common.evaluation.torch_classifier import Normalizer

    splits = index.load_splits(str(images))
    plan = sampling.StepPlan(len(splits.train), 3, 4)
    config = dataclasses.replace(RECIPE, data=str(images))
    augment = transforms.train_transform(config)
    batches = loader.TrainLoader(splits.train, augment, plan, config.seed, "fail", 0, 1, 0, False).epoch(0)
    torch.manual_seed(0)
    model = SPEC.build(num_classes=3)
    normalize = Normalizer(SPEC, Device("cpu"), "channels_last")
    means = []
    for _ in range(3):
        x = model.stem[0](normalize(next(batches).pixels_NHWC))
        means.append(0.1 * x.mean(dim=(0, 2, 3)))  # momentum 0.1 from a start of 0
    got = final(folder)["state_dict"]
    assert torch.allclose(got["stem.1.running_mean"], torch.stack(means).mean(0), atol=1e-6)
    assert got["stem.1.num_batches_tracked"] == 1


OPTIONS = {
    "lr": ["--lr=0.05"],
    "lr_schedule": ["--lr-schedule=constant"],
    "warm_up": ["--warm-up-epochs=1"],
    "momentum": ["--momentum=0.5"],
    "rmsprop": ["--optimizer=rmsprop"],
    "adamw": ["--optimizer=adamw"],
    "weight_decay": ["--wd=0.1"],
    "decay_norm": ["--wd=0.1", "--no-decay-norm"],
    "label_smoothing": ["--label-smoothing=0.5"],
    "smoothing_targets": ["--smoothing-off=others"],
    "accumulate": ["--accumulate=2"],
    "ema": ["--ema=0.5"],
    "clip_grad": ["--clip-grad=0.1"],
    "min_crop": ["--min-crop=0.9"],
    "seed": ["--seed=1"],
    "dropout": ["--dropout=0.9"],
    "mixup": ["--mixup=1"],
    "cutmix": ["--cutmix=1"],
    "randaugment": ["--auto-augment=randaugment"],
    "trivialaugment": ["--auto-augment=trivialaugment"],
    "random_erasing": ["--random-erasing=1"],
    "color_jitter": ["--color-jitter=0.4"],
    "batch_size": ["-b", "20"],
    "num_classes": ["-p", "5"],
    "image_size": ["--image-size=48"],
    "max_steps": ["--max-steps=3"],
    "epochs": ["--epochs=1"],
    "amp": ["--amp", "--amp-dtype=bf16"],
}


@pytest.fixture(scope="module")
def in_process(images, tmp_path_factory):
    """train(options) -> final state; runs in this process, for speed."""

    def start(options):
        folder = tmp_path_factory.mktemp("option") / "run"
        PROGRAM.main(["--data", str(images), "--output-dir", str(folder), "--epochs=2", *options])
        return final(folder)

    return start


@pytest.fixture(scope="module")
def plain(in_process):
    return in_process([])


def evaluated_weights(state):
    return state["ema_state_dict"] or state["state_dict"]


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_option_changes_the_result(name, in_process, plain):
    changed = evaluated_weights(in_process(OPTIONS[name]))
    before = evaluated_weights(plain)
    assert any(changed[k].shape != before[k].shape or not torch.equal(changed[k], before[k]) for k in before), name


def test_the_same_command_gives_the_same_bits(in_process, plain):
    assert differences(in_process([])["state_dict"], plain["state_dict"]) == []


def test_the_layout_changes_no_more_than_rounding(in_process, plain):
    other = in_process(["--memory-format=nchw", "--max-steps=1"])["state_dict"]
    same = in_process(["--memory-format=channels_last", "--max-steps=1"])["state_dict"]
    assert all(torch.allclose(other[k].double(), same[k].double(), atol=1e-4) for k in same)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiling_changes_no_more_than_rounding(in_process):
    eager = in_process(["--max-steps=2"])
    compiled = in_process(["--max-steps=2", "--compile"])
    assert compiled["state_dict"].keys() == eager["state_dict"].keys()
    assert all(
        torch.allclose(compiled["state_dict"][k].double(), v.double(), atol=1e-5)
        for k, v in eager["state_dict"].items()
    )


def test_ema_follows_by_its_decay(in_process):
    """After one update the average is the weights; after the second it is decay * first + (1 - decay) * second."""
    first = in_process(["--ema=0.75", "--max-steps=1"])
    second = in_process(["--ema=0.75", "--max-steps=2"])
    assert torch.equal(first["ema_state_dict"]["fc.weight"], first["state_dict"]["fc.weight"])
    expected = 0.75 * first["state_dict"]["fc.weight"] + 0.25 * second["state_dict"]["fc.weight"]
    assert torch.allclose(second["ema_state_dict"]["fc.weight"], expected, atol=1e-7)


def test_a_non_finite_loss_stops_the_run_and_names_step_and_images(images, run, tmp_path):
    done = run(TINY, "--data", images, "--output-dir", tmp_path / "nan", "--lr=1e30", "--print-freq=1", check=1)
    message = user_error(done)
    assert "the loss is " in message and "at epoch 1 step" in message and ".jpg" in message


def test_the_last_four_lines_are_those_of_the_document(images, run):
    lines = run(TINY, "--data", images, "--epochs=1").stdout.splitlines()[-4:]
    assert lines[0] == "------------------ Final result ------------------"
    for line, label in zip(
        lines[1:], ("Final Performance images/sec", "Final Train Accuracy", "E2E Training Duration sec"), strict=True
    ):
        name, _, value = line.partition(" : ")
        assert name == label and float(value) >= 0


def test_a_run_folder_is_complete_and_numbered(images, run, tmp_path):
    for _ in range(2):
        run(TINY, "--data", images, "--epochs=1")
    folders = sorted((tmp_path / "output" / "tiny_train").iterdir())
    assert [folder.name for folder in folders] == ["00000", "00001"]
    assert {path.name for path in folders[0].iterdir()} == {
        "config.json",
        "log.txt",
        "metrics.jsonl",
        "summary.json",
        "checkpoint.pth.tar",
        "checkpoint.prev.pth.tar",
        "model_best.pth.tar",
    }
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["val_images"] == 21 and summary["best_epoch"] == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(images, run, tmp_path, damage):
    folder = tmp_path / "torn"
    run(TINY, "--data", images, "--output-dir", folder, "--epochs=1", "--save-every=2")
    whole = tmp_path / "whole"
    run(TINY, "--data", images, "--output-dir", whole, "--epochs=2")
    newest = folder / "checkpoint.pth.tar"
    content = newest.read_bytes()
    weight = final(folder)["state_dict"]["stem.3.weight"].contiguous(memory_format=torch.channels_last)
    middle = content.index(weight.permute(0, 2, 3, 1).numpy().tobytes()[:64]) + 32
    newest.write_bytes(
        {
            "truncated": content[:middle],
            "empty": b"",
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        }[damage]
    )
    done = run(TINY, "--data", images, "--output-dir", folder, "--epochs=2", "--resume=auto")
    assert f"resume: {newest}" in done.stdout
    assert "Final Train Accuracy" in done.stdout
    # An epoch-cosine of two epochs has another first epoch than one of one: only the position can be compared.
    assert (final(folder)["epoch"], final(folder)["step"]) == (2, 0)


def test_a_broken_image_can_be_skipped(images, run, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    for part in ("train", "val"):
        (data / part / "bee" / "0003.jpg").write_bytes(b"no image")
    done = run(TINY, "--data", data, "--epochs=1", "--on-bad-image=skip")
    for part in ("train", "val"):
        assert done.stderr.count(f"skipped: {data / part / 'bee' / '0003.jpg'}") == 1
    assert "(20 images, 1 skipped)" in done.stdout


def test_pretrained_weights_start_a_training_with_another_class_count(images, run, tmp_path):
    run(TINY, "--data", images, "--output-dir", tmp_path / "a", "--epochs=1")
    done = run(
        TINY,
        "--data",
        images,
        "--output-dir",
        tmp_path / "b",
        "--pretrained",
        tmp_path / "a" / "model_best.pth.tar",
        "-p",
        7,
        "--max-steps=1",
        "--lr=1e-9",
    )
    assert "fc has 3 classes, not 7; initialized anew" in done.stdout
    a, b = final(tmp_path / "a")["state_dict"], final(tmp_path / "b")["state_dict"]
    assert torch.allclose(a["stem.0.weight"], b["stem.0.weight"], atol=1e-6)
    assert b["fc.weight"].shape == (7, 16)


def test_interrupted_twice_leaves_at_once(images, tmp_path):
    folder = tmp_path / "run"
    process = background(
        sys.executable, TINY, "--data", images, "--output-dir", folder, "--epochs=1000", "--print-freq=1", cwd=tmp_path
    )
    assert stopped_at(process, folder, signal.SIGINT, after_steps=3) == 130
    assert (pathlib.Path(folder) / "checkpoint.pth.tar").exists()


def test_an_empty_validation_set_is_not_taken_for_none(images, tmp_path):
    """An empty index, which index.load_val refuses, is false as a condition."""
    run = PROGRAM.prepare(["--data", str(images), "--device=cpu"])
    splits = run.splits
    empty = index.Splits(splits.train, splits.val.without(set(splits.val.names())))
    run = dataclasses.replace(run, splits=empty, folder=tmp_path)
    assert run_setup.common_facts(run)["--data, val/"].startswith("0 images, fingerprint ")
    cpu, world = device.Device("cpu"), distributed.World()
    loop = trainer.Trainer(run, world, cpu, distributed.Group(world, cpu), run_log.Report(None))
    assert isinstance(loop.val_loader, loader.EvalLoader)
    loop.close()
    assert ", 0 for validation" in program._headline(run, loop, cpu, world)
