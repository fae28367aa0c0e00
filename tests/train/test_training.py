"""The trainer on a tiny network: exact resume, any number of ranks, every option has an effect."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import onnx
import pytest
import torch
from support import (
    LAUNCH_TINY,
    ROOT,
    TESTS,
    TINY,
    all_gone,
    background,
    differences,
    final,
    metrics_of,
    processes_naming,
    run_differences,
    send_delivered,
    stopped_at,
    user_error,
    wait_until,
)
from tiny import PROGRAM, RECIPE, SPEC

from common import distributed, errors
from common.data import augment, index, loader, sampling
from common.deploy import export
from common.device import device
from common.evaluation.program import EvalConfig, evaluate_folder
from common.evaluation.torch_classifier import Normalizer
from common.train import losses, program, run_log, run_setup, trainer
from common.train.step import step_seed

# Everything that draws random numbers or keeps state beside the weights.
EVERYTHING = (
    "--mixup=0.2",
    "--cutmix=0.5",
    "--auto-augment=trivialaugment",
    "--random-erasing=0.3",
    "--color-jitter=0.2",
    "--repeated-aug=3",
    "--ema=0.9",
    "--accumulate=2",
    "--lr-schedule=cosine-step",
    "--warm-up-epochs=1",
)


@pytest.fixture
def train(images, run, tmp_path):
    """train(name, *options, check=0) -> run folder, in a process of its own."""

    def start(name, *options, check=0):
        run(TINY, "--data", images, "--output-dir", tmp_path / name, *options, check=check)
        return tmp_path / name

    return start


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
    assert run_differences(whole, folder) == []


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
    assert run_differences(one_rank, tmp_path / "many") == []


def test_two_ranks_see_the_same_images_and_count_every_validation_image(images, run, tmp_path):
    out = run(*LAUNCH_TINY, f"--data_path={images}", "--device=cpu", "--devices=2", "--", "--epochs=1").stdout
    assert "2 rank(s)" in out and "(21 images)" in out
    folder = tmp_path / "output" / "tiny" / "00000"
    evaluated = run(TINY, "--data", images, "--evaluate", "--resume", folder / "model_best.pth.tar").stdout
    printed = next(line for line in out.splitlines() if "Acc@1" in line)
    assert evaluated.splitlines()[-1].split("loss")[0].strip() in printed


def first_micro_batches(images, number, size):
    """Batches of the first step of a run on `images`, as its one rank reads them."""
    splits = index.load_splits(str(images))
    plan, config = sampling.StepPlan(len(splits.train), number, size), dataclasses.replace(RECIPE, data=str(images))
    transform = augment.TrainTransform(config)
    batches = loader.TrainLoader(splits.train, transform, plan, config.seed, "fail", 0, 1, 0, False).epoch(0)
    return [next(batches) for _ in range(number)]


NORMALIZE = Normalizer(SPEC, device.Device("cpu"), "channels_last")


def test_batch_norm_statistics_are_the_mean_over_micro_batches(images, train):
    """One step of three micro-batches: the mean of three updates that all start from the initial statistics."""
    folder = train("bn", "--max-steps=1", "--accumulate=3", "--epochs=1")
    torch.manual_seed(0)
    model = SPEC.build(num_classes=3)
    means = []
    for batch in first_micro_batches(images, 3, 4):
        x = model.stem[0](NORMALIZE(batch.pixels_NHWC))
        means.append(0.1 * x.mean(dim=(0, 2, 3)))  # momentum 0.1 from a start of 0
    got = final(folder)["state_dict"]
    assert torch.allclose(got["stem.1.running_mean"], torch.stack(means).mean(0), atol=1e-6)
    assert got["stem.1.num_batches_tracked"] == 1


def test_the_loss_of_a_step_is_the_main_heads_and_four_tenths_of_the_auxiliary_heads(images, train):
    folder = train("loss", "--max-steps=1", "--epochs=1", "--print-freq=1", "--dropout=0", "--label-smoothing=0.1")
    torch.manual_seed(0)
    model = SPEC.build(num_classes=3, dropout=0.0).train()
    (batch,) = first_micro_batches(images, 1, 12)
    main, auxiliary = (
        torch.nn.functional.cross_entropy(logits, batch.labels_N, label_smoothing=0.1).item()
        for logits in model(NORMALIZE(batch.pixels_NHWC))
    )
    logged = next(record["loss"] for record in metrics_of(folder) if record["kind"] == "train")
    assert logged == pytest.approx(main + 0.4 * auxiliary, rel=1e-5)


def test_bce_of_mixed_images_is_that_of_both_heads_and_validation_keeps_cross_entropy(images, train):
    options = ("--bce", "--mixup=0.5", "--cutmix=1", "--dropout=0", "--label-smoothing=0.1", "--lr=1e-9")
    folder = train("bce", *options, "--max-steps=1", "--epochs=1", "--print-freq=1")
    torch.manual_seed(0)
    model, config = SPEC.build(num_classes=3, dropout=0.0).train(), dataclasses.replace(RECIPE, mixup=0.5, cutmix=1.0)
    (batch,) = first_micro_batches(images, 1, 12)
    torch.manual_seed(step_seed(0, 0, 0, 0))
    pixels, mixed_NK = losses.mixer(config, 3)(NORMALIZE(batch.pixels_NHWC), batch.labels_N)
    assert ((mixed_NK > 0).sum(1) > 1).any()
    main, auxiliary = (
        torch.nn.functional.binary_cross_entropy_with_logits(logits, 0.9 * mixed_NK + 0.1 / 3).item()
        for logits in model(pixels)
    )
    logged = {record["kind"]: record["loss"] for record in metrics_of(folder)}
    assert logged["train"] == pytest.approx(main + 0.4 * auxiliary, rel=1e-5)
    assert logged["val"] == pytest.approx(math.log(3), rel=0.3)  # binary cross entropy would be 0.69


@pytest.fixture(scope="module")
def larger_in_validation(images, tmp_path_factory):
    """Run folder of four steps that trained at 32 pixels and validated at 48."""
    folder = tmp_path_factory.mktemp("sizes") / "run"
    PROGRAM.main(["--data", str(images), f"--output-dir={folder}", "--eval-size=48", "--max-steps=4", "--epochs=1"])
    return folder


def test_a_checkpoint_is_used_at_the_size_of_its_validation(images, larger_in_validation, tmp_path):
    folder, config = larger_in_validation, EvalConfig(data=str(images), device="cpu", workers=0)
    config = dataclasses.replace(config, resume=str(folder / "checkpoint.pth.tar"))
    (record,) = (record for record in metrics_of(folder) if record["kind"] == "val")
    counts, _ = evaluate_folder(SPEC, config, lambda num_outputs: 0.1)
    at_32, _ = evaluate_folder(SPEC, dataclasses.replace(config, image_size=32), lambda num_outputs: 0.1)
    assert (record["correct"], record["loss"]) == (counts.correct.tolist(), pytest.approx(counts.loss, rel=1e-6))
    assert abs(counts.loss - at_32.loss) > 1e-4
    state = final(folder)
    assert (state["image_size"], state["config"]["image_size"], state["config"]["eval_size"]) == (48, 32, 48)
    export.export(SPEC, export.ExportConfig(ckpt=config.resume, onnx=str(tmp_path / "tiny.onnx")))
    metadata = {each.key: each.value for each in onnx.load(tmp_path / "tiny.onnx").metadata_props}
    assert metadata["image_size"] == "48"


def test_both_sizes_are_kept_on_resume(images, larger_in_validation, tmp_path):
    shutil.copytree(larger_in_validation, tmp_path / "run")
    words = ["--data", str(images), f"--output-dir={tmp_path}/run", "--epochs=1"]
    PROGRAM.main([*words, "--resume=auto"])
    PROGRAM.main([*words[:2], f"--output-dir={tmp_path}/whole", "--epochs=1", "--eval-size=48"])
    state, whole = final(tmp_path / "run"), final(tmp_path / "whole")
    assert differences(state["state_dict"], whole["state_dict"]) == []
    assert (state["image_size"], state["config"]) == (48, {**whole["config"], **paths_of(state)})
    for option, found in (("--eval-size=32", "has 48"), ("--image-size=48", "has 32"), ("--repeated-aug=2", "has 1")):
        message = f"^{option.replace('=', ': ')}, but the checkpoint .* {found}; keep"
        with pytest.raises(errors.UserError, match=message):
            PROGRAM.prepare(*PROGRAM.parse([*words, "--resume=auto", option]))
    PROGRAM.prepare(*PROGRAM.parse([*words, "--resume=auto", "--eval-size=48", "--image-size=32"]))


def paths_of(state):
    return {name: state["config"][name] for name in ("output_dir", "resume")}


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
    "smoothing_targets": ["--smoothing-targets=others"],
    "accumulate": ["--accumulate=2"],
    "ema": ["--ema=0.5"],
    "clip_grad": ["--clip-grad=0.1"],
    "min_crop": ["--min-crop=0.9"],
    "train_crop": ["--train-crop=center"],
    "seed": ["--seed=1"],
    "dropout": ["--dropout=0.9"],
    "mixup": ["--mixup=1"],
    "cutmix": ["--cutmix=1"],
    "repeated_aug": ["--repeated-aug=2"],
    "bce": ["--bce"],
    "bce_target_thresh": ["--bce", "--bce-target-thresh=0.5"],
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


def notes_of(images, *options):
    """Notes of a run on the 60 training images in 3 classes."""
    root = images / "train"
    found = run_setup.notes(PROGRAM.prepare(*PROGRAM.parse(["--data", str(images), *options])))
    return [note.replace(str(root), "train") for note in found]


def test_outputs_without_images_and_dropped_images_are_noted(images, tmp_path):
    assert notes_of(images, "-b", "20") == notes_of(images, "-b", "20", "-p", "3") == []
    assert notes_of(images, "-b", "16") == [
        "note: an epoch takes 48 of the 60 images; the 12 that do not fill a step of 16 are dropped, "
        "others in every epoch"
    ]
    assert notes_of(images, "-b", "16", "--repeated-aug=4") == [
        "note: --repeated-aug 4: an epoch takes 12 of the 60 images, others in every epoch, 4 times each"
    ]
    assert notes_of(images, "-b", "20", "-p", "5") == [
        "note: --num-classes is 5, but train has 3 class folders: 2 outputs have no images; "
        "give --num-classes=3 to train one output per folder"
    ]
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "val" / "ant" / "x.heic").write_bytes(b"")
    assert notes_of(tmp_path / "data", "-b", "20") == [
        f"note: ignored in {tmp_path}/data/val: 1 .heic, which are not read; convert them to JPEG or PNG"
    ]


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
    plain = plain if name != "bce_target_thresh" else in_process(OPTIONS["bce"])
    changed = evaluated_weights(in_process(OPTIONS[name]))
    before = evaluated_weights(plain)
    assert any(changed[k].shape != before[k].shape or not torch.equal(changed[k], before[k]) for k in before), name


def test_the_same_command_gives_the_same_bits(in_process, plain):
    assert differences(in_process([])["state_dict"], plain["state_dict"]) == []


def test_the_layout_is_used_and_changes_no_more_than_rounding(in_process, monkeypatch):
    seen, states = set(), {}
    forward = torch.nn.Conv2d.forward

    def recorded(self, x):
        for tensor in (x, self.weight):
            seen.update(
                name
                for name, layout in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last))
                if tensor.is_contiguous(memory_format=layout)
            )
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", recorded)
    for layout in ("nchw", "channels_last"):
        seen.clear()
        state = in_process([f"--memory-format={layout}", "--max-steps=1"])
        assert seen == {layout} and state["memory_format"] == layout
        states[layout] = state["state_dict"]
    for name, value in states["nchw"].items():
        assert torch.allclose(value.double(), states["channels_last"][name].double(), atol=1e-4), name


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiling_changes_no_more_than_rounding(in_process, monkeypatch):
    from torch._dynamo.utils import counters
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "vec_isa_ok", False)  # else the compiler tries AVX2, AVX512 and AMX: 10 s
    eager = in_process(["--max-steps=2"])
    counters.clear()
    compiled = in_process(["--max-steps=2", "--compile"])
    assert counters["stats"]["unique_graphs"] == 1
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


@pytest.fixture(scope="module")
def two_epochs(images, tmp_path_factory):
    """Run folder of a finished training of ten steps that kept its checkpoints of steps 3, 5, 8 and 10."""
    folder = tmp_path_factory.mktemp("two epochs") / "run"
    keep = ["--save-every=3", "--keep-last=10"]
    PROGRAM.main(["--data", str(images), "--output-dir", str(folder), "--epochs=2", *keep])
    return folder


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(images, run, tmp_path, two_epochs, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(two_epochs, folder, ignore=shutil.ignore_patterns("checkpoint*"))
    for kept, name in ((10, "checkpoint.pth.tar"), (8, "checkpoint.prev.pth.tar")):
        shutil.copy(two_epochs / f"checkpoint-{kept:08d}.pth.tar", folder / name)
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
    assert f"resume: {newest}" in done.stdout and "resumed at epoch 2 step 3;" in done.stdout
    assert run_differences(two_epochs, folder) == []


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


def test_an_interrupt_saves_and_ends_with_status_130(images, tmp_path):
    folder = tmp_path / "run"
    process = background(
        sys.executable, TINY, "--data", images, "--output-dir", folder, "--epochs=1000", "--print-freq=1", cwd=tmp_path
    )
    assert stopped_at(process, folder, signal.SIGINT, after_steps=3) == 130
    assert (folder / "checkpoint.pth.tar").exists()


# The third optimizer step never ends.
HANGS = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from tiny import PROGRAM
from torch.optim.optimizer import register_optimizer_step_pre_hook
steps = []
def hang(*_):
    steps.append(1)
    if len(steps) == 3:
        open("hangs", "w").close()
        while True:
            time.sleep(1)
register_optimizer_step_pre_hook(hang)
PROGRAM.main()
"""


def test_interrupted_twice_leaves_at_once(images, tmp_path):
    """The first SIGINT waits for the end of the step, which never comes; the second one waits for nothing."""
    folder, script = tmp_path / "run", tmp_path / "hangs.py"
    script.write_text(HANGS.format(root=str(ROOT), tests=str(TESTS)))
    words = [sys.executable, script, "--data", images, "--output-dir", folder, "--workers=2"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until((tmp_path / "hangs").exists, process)
        send_delivered(process.pid, signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None, "the first interrupt did not wait for the step"
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
        assert (process.returncode, printed) == (130, "")
        assert all_gone(folder), "a dataloader worker was left behind"
        assert not (folder / "checkpoint.pth.tar").exists(), "it saved in the middle of a step"
    finally:
        for pid in processes_naming(folder):
            os.kill(pid, signal.SIGKILL)


def test_an_empty_validation_set_is_not_taken_for_none(images, tmp_path):
    """An empty index, which index.load_val refuses, is false as a condition."""
    run = PROGRAM.prepare(*PROGRAM.parse(["--data", str(images), "--device=cpu"]))
    splits = run.splits
    empty = index.Splits(splits.train, splits.val.without(set(splits.val.names())))
    run = dataclasses.replace(run, splits=empty, folder=tmp_path)
    assert run_setup.shared_facts(run)["--data, val/"].startswith("0 images, fingerprint ")
    cpu, world = device.Device("cpu"), distributed.World()
    loop = trainer.Trainer(run, distributed.Group(world, cpu), run_log.RunLogger(None))
    assert isinstance(loop.validate.loader, loader.EvalLoader)
    loop.close()
    assert ", 0 for validation" in program._headline(loop, cpu)
