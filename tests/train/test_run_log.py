"""What a run prints: time left, the accuracy that the last lines mean, results that are not meaningful yet."""

import re
import types

import pytest
import torch
from support import final
from tiny import PROGRAM

from common.evaluation import metrics
from common.evaluation.metrics import note_on_loss
from common.evaluation.torch_classifier import short_training
from common.train import run_setup
from common.train.meters import Throughput, TimeLeft, time_left
from common.train.validation import note_on_ema
from inception_v3.train import PROGRAM as INCEPTION_V3
from xception.train import PROGRAM as XCEPTION


@pytest.mark.parametrize(
    ("done", "max_steps", "epoch_s", "run_s"),
    [
        (30, None, 140, 540 + 90),  # 270 steps of 2 s, three validations of 30 s
        (100, None, 0, 400 + 90),
        (101, None, 198, 398 + 60),
        (300, None, 0, 30),
        (30, 40, 20, 20 + 30),
        (110, 150, 80, 80 + 30),
        (110, 999, 180, 380 + 60),
    ],
)
def test_time_left_by_hand(done, max_steps, epoch_s, run_s):
    """Three epochs of 100 steps."""
    assert time_left(done, 3, 100, max_steps, 2.0, 30.0) == (epoch_s, run_s)


def test_time_left_is_printed_in_hours_and_days():
    assert str(TimeLeft(754.4, 36300)) == "0:12:34 of the epoch, 10:05:00 of the run"
    assert str(TimeLeft(0.0, 90061)) == "1 day, 1:01:01 of the run"


def test_the_lines_of_a_run(images, tmp_path, capsys):
    """Three classes: top-5 would be 100 %. The document's four lines stay the last ones."""
    PROGRAM.main(["--data", str(images), "--output-dir", str(tmp_path / "run"), "--epochs=2"])
    out = capsys.readouterr().out
    lines = out.splitlines()
    progress = [line for line in lines if re.match(r"epoch \d/2 step", line)]
    assert len(progress) == 6 and all(
        re.search(r" fps [\d.]+ left .*\d:\d\d:\d\d of the run$", line) for line in progress
    )
    validated = [line for line in lines if "Acc@1" in line]
    assert len(validated) == 2 and "Acc@5" not in out
    best = [line for line in validated if line.endswith(" best")][-1]
    acc1, epoch = re.search(r"Acc@1 ([\d.]+)", best)[1], re.match(r"epoch (\d)", best)[1]
    assert lines[-5] == f"Best validation top-1 : {acc1} % in epoch {epoch}"
    assert lines[-2] == f"Final Train Accuracy : {acc1}"
    assert "not meaningful" not in out


def test_results_that_are_not_meaningful_yet_are_explained_once(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "_FACTOR_OF_NOTE", 0)
    PROGRAM.main(["--data", str(images), "--output-dir", str(tmp_path / "run"), "--epochs=3", "--ema=0.99"])
    loss, averages = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert loss.startswith(
        "note: the validation loss is not meaningful yet: after 5 steps, 59 % of batch norm's running"
    )
    expected = (
        "validation scores the averaged weights (--ema 0.99); after 5 steps they are 96 % those of the first step"
    )
    assert averages == f"note: {expected}"
    state = final(tmp_path / "run")
    steps = [int(state[kind]["stem.1.num_batches_tracked"]) for kind in ("state_dict", "ema_state_dict")]
    assert steps == [15, 15], "averages of counters would be rounded down, and eval.py would say: after 1 steps"


@pytest.mark.parametrize("words", [[], ["--freeze=head", "--freeze-norm"]])
def test_statistics_of_other_weights_do_not_explain_a_loss(images, weights, tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(metrics, "_FACTOR_OF_NOTE", 0)
    words = ["--data", str(images), "--output-dir", str(tmp_path / "run"), "--pretrained", str(weights), *words]
    PROGRAM.main([*words, "--epochs=1"])
    PROGRAM.main([*words[:4], "--resume=auto", "--epochs=2"])
    assert "not meaningful" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("loss", "train_loss", "steps", "momentum", "is_explained"),
    [
        (17_074_315.0, 2.1, 24, 0.1, True),
        (17_074_315.0, 2.1, 5000, 0.1, False),  # another cause
        (17_074_315.0, 2.1, 24, None, False),  # no batch norm
        (2.3, 2.1, 24, 0.1, False),
        (30.0, 2.1, 24, 0.1, False),  # below five times ln 1000, the loss of guessing
        (40.0, 9.0, 24, 0.1, False),
        (46.0, 9.0, 24, 0.1, True),
    ],
)
def test_only_early_and_large_losses_are_explained(loss, train_loss, steps, momentum, is_explained):
    assert bool(note_on_loss(loss, train_loss, 1000, steps, momentum)) == is_explained


def test_eval_explains_the_loss_of_a_checkpoint_after_a_handful_of_steps_and_no_other():
    def network(steps):
        norm = torch.nn.BatchNorm2d(4)
        norm.num_batches_tracked.fill_(steps)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), norm)

    assert "after 3 steps, 73 % of batch norm's" in note_on_loss(19185038.5, 0.0, 3, *short_training(network(3)))
    assert note_on_loss(19185038.5, 0.0, 3, *short_training(network(0))) == ""  # weights of another program
    assert note_on_loss(19185038.5, 0.0, 3, *short_training(network(5000))) == ""
    assert note_on_loss(1.1, 0.0, 3, *short_training(network(3))) == ""


@pytest.mark.parametrize(
    ("decay", "steps", "is_said"), [(0.0, 5, False), (0.9, 5, True), (0.9, 8, False), (1.0, 9, True)]
)
def test_averages_of_the_first_steps_are_named(decay, steps, is_said):
    """0.9 ** 4 = 0.66, 0.9 ** 7 = 0.48."""
    assert bool(note_on_ema(decay, steps)) == is_said


SEED_8P = "--lr is 1.2, that of recipe full_8p for steps of 2048 images; steps of this run have"


@pytest.mark.parametrize(
    ("program", "options", "images_per_step", "note"),
    [
        (INCEPTION_V3, ["--recipe=full_8p"], 32, f"{SEED_8P} 32; in proportion it would be --lr=0.0187"),
        (INCEPTION_V3, ["--recipe=full_8p"], 4096, f"{SEED_8P} 4096; in proportion it would be --lr=2.4"),
        (INCEPTION_V3, ["--recipe=full_8p"], 1025, ""),
        (INCEPTION_V3, ["--recipe=full_8p", "--lr=1.2"], 32, ""),
        (INCEPTION_V3, ["--recipe=quickstart"], 4, ""),  # AdamW
        (INCEPTION_V3, [], 256, ""),
        (
            XCEPTION,
            ["--recipe=GPU"],
            64,
            "--lr-max is 0.4, that of recipe GPU for steps of 512 images; steps of this run have 64; in proportion it "
            "would be --lr-max=0.05",
        ),
        (XCEPTION, ["--recipe=Ascend"], 1024, ""),
    ],
)
def test_the_learning_rate_of_a_recipe_for_other_batch_sizes(program, options, images_per_step, note):
    config, explicit = program.parse(options)
    found = run_setup.note_on_lr(program.recipes[config.recipe], config, explicit, images_per_step)
    assert found == ([f"note: {note}"] if note else [])


def test_the_note_on_the_learning_rate_is_printed_by_a_new_run_and_not_by_a_resumed_one(images, tmp_path, capsys):
    words = ["--data", str(images), "--output-dir", str(tmp_path / "run"), "--resume=auto", "--batch-size=6"]
    for steps, count in ((1, 1), (2, 0)):
        PROGRAM.main([*words, f"--max-steps={steps}"])
        assert (
            capsys.readouterr().out.count("note: --lr is 0.1, that of recipe default for steps of 12 images") == count
        )


@pytest.mark.parametrize(
    ("steps", "skip", "left_out", "images_per_s"),
    [
        (0, 2, 0, 0),
        (1, 2, 0, 100 / 10),
        (2, 2, 0, 200 / 20),
        (3, 2, 2, 100 / 2),
        (5, 2, 2, 300 / 6),
        (3, 0, 0, 300 / 22),
    ],
)
def test_throughput_leaves_out_the_first_steps_where_there_are_others(monkeypatch, steps, skip, left_out, images_per_s):
    """The first two steps take 10 s each, the others 2 s."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    throughput = Throughput(types.SimpleNamespace(synchronize=lambda: None), skip, 100)
    throughput.start()
    for step in range(steps):
        clock[0] += 10 if step < 2 else 2
        throughput.step()
    throughput.stop()
    assert (throughput.skipped_steps, throughput.images_per_s) == (left_out, pytest.approx(images_per_s))
