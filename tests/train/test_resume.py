"""What --resume does with a run that is complete, and with options that differ from those of its checkpoint."""

import dataclasses
import json
import shutil

import pytest
import torch
from support import LAUNCH_TINY, TINY
from tiny import PROGRAM

from common.data import augment, sampling
from common.errors import NothingToDo, UserError

DONE = "has completed 2 epochs (10 steps), best validation top-1 "


@pytest.fixture(scope="module")
def complete(images, tmp_path_factory):
    """Run folder of two epochs of five steps. Read only."""
    folder = tmp_path_factory.mktemp("complete") / "run"
    PROGRAM.main(["--data", str(images), "--output-dir", str(folder), "--epochs=2", "--lr=0.05"])
    return folder


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_complete_run_has_nothing_left_to_do_and_keeps_its_files(images, complete, run, tmp_path):
    before = contents(complete)
    options = ["--epochs=2", "--lr=0.05"]
    keys = [f"--data_path={images}", "--device=cpu", f"--output_dir={complete}", "--resume=auto"]
    best = json.loads((complete / "summary.json").read_text())
    for words in (
        [TINY, "--data", images, "--output-dir", complete, "--resume=auto", *options],
        [*LAUNCH_TINY, *keys, "--", *options],
        [*LAUNCH_TINY, *keys, "--devices=2", "--", *options],
        [TINY, "--data", images, "--resume", complete / "checkpoint.pth.tar", "--max-steps=7"],
    ):
        done = run(*words)
        (line,) = done.stdout.splitlines()
        assert line.startswith("nothing is left to do: ") and f"{DONE}{best['best_acc1']:.3f} % in epoch" in line
        assert line.endswith(f"a larger {'--max-steps' if '--max-steps=7' in words else '--epochs'} continues it")
        assert done.stderr == ""
    with pytest.raises(NothingToDo):  # the launcher starts no ranks
        PROGRAM.check(["--data", str(images), "--output-dir", str(complete), "--resume=auto", *options], 2, 1)
    assert contents(complete) == before
    assert list(tmp_path.iterdir()) == []  # no new run folder


def test_the_ranks_themselves_find_a_complete_run(images, complete, run, monkeypatch):
    """A round of restarted ranks after the end of the run: one line, status 0, no file."""
    before = contents(complete)
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29411", "GROUP_WORLD_SIZE": "1"}
    done = run(TINY, "--data", images, "--output-dir", complete, "--resume=auto", "--epochs=2", env=env)
    assert done.stdout.count("nothing is left to do") == 1 and contents(complete) == before


def test_a_run_that_was_killed_before_its_summary_writes_it(images, complete, tmp_path, capsys):
    shutil.copytree(complete, tmp_path / "run")
    words = ["--data", str(images), "--output-dir", str(tmp_path / "run"), "--resume=auto", "--lr=0.05"]
    summary = tmp_path / "run" / "summary.json"
    for spoil in (summary.unlink, lambda: summary.write_text('{"steps": 5}')):  # of one epoch, then continued
        spoil()
        PROGRAM.main([*words, "--epochs=2"])
        out = capsys.readouterr().out
        assert "nothing is left" not in out and "no step was left to run, so that no throughput was measured" in out
        assert json.loads(summary.read_text())["steps"] == 10


def test_more_epochs_continue_a_complete_run_and_are_said_in_one_line(images, complete, tmp_path, capsys):
    shutil.copytree(complete, tmp_path / "run")
    words = ["--data", str(images), "--output-dir", str(tmp_path / "run"), "--resume=auto", "--epochs=3", "--lr=0.02"]
    PROGRAM.main([*words, "--weight-decay=0.1", "--workers=1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "before" in line]
    expected = "--epochs is 3, before 2; --lr is 0.02, before 0.05; --weight-decay is 0.1, before 0.0001"
    assert lines == [f"note: --resume: {expected}; the run continues with the new values"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 15


def test_an_unchanged_command_says_nothing(images, tmp_path, capsys):
    words = [
        "--data",
        str(images),
        "--output-dir",
        str(tmp_path / "run"),
        "--resume=auto",
        "--ema=0.9",
        "--dropout=0.1",
    ]
    PROGRAM.main([*words, "--max-steps=2", "--memory-format=nchw"])
    PROGRAM.main([*words, "--max-steps=2", "--memory-format=nchw", "--print-freq=1"])
    out = capsys.readouterr().out
    assert "before" not in out and "nothing is left to do" in out


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ("--batch-size=24", "--batch-size: 24 on 1 machine(s) is 24 images per step, but the checkpoint .* has 12"),
        ("--image-size=48", "--image-size: 48, but the checkpoint .* has 32"),
        ("--num-classes=4", "--num-classes: 4, but .* was trained with 3"),
        ("--seed=7", "--seed: 7, but the checkpoint .* has 0"),
        ("--dropout=0.5", "--dropout: 0.5, but the checkpoint .* has 0.25"),
        ("--optimizer=adamw", "--optimizer: adamw, but the checkpoint .* has sgd"),
    ],
)
def test_what_a_resumed_run_cannot_change_names_pretrained_as_the_way(images, complete, option, found):
    words = ["--data", str(images), "--resume", str(complete / "checkpoint.pth.tar"), "--epochs=3", option]
    way = "; keep it, or start a new run from these weights with --pretrained FILE instead of --resume"
    with pytest.raises(UserError, match=found.replace("(", r"\(").replace(")", r"\)") + way):
        PROGRAM.prepare(*PROGRAM.parse(words))


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (["--accumulate=2"], "--accumulate"),
        (["--accumulate=3", "--pretrained=w.pth", "--head-init=weights"], "--accumulate, --pretrained"),
        (["--accumulate=1", "--lr=0.05"], ""),  # as before, or with an effect
    ],
)
def test_options_without_effect_on_a_resumed_run_are_named(images, complete, options, flags):
    words = ["--data", str(images), "--resume", str(complete / "checkpoint.pth.tar"), "--epochs=3", *options]
    notes = [note for note in PROGRAM.prepare(*PROGRAM.parse(words)).notes if "no effect" in note]
    expected = f"note: --resume: no effect of {flags}; weights and micro-batches are those of the checkpoint"
    assert notes == ([expected] if flags else [])


def test_a_run_with_another_order_of_images_goes_on_at_the_end_of_an_epoch_alone(images, complete, tmp_path):
    state = torch.load(complete / "checkpoint.pth.tar")
    assert state.pop("order_version") == sampling.ORDER_VERSION  # checkpoints before version 2 have no number
    words = ["--data", str(images), "--resume", str(tmp_path / "older.pth.tar"), "--epochs=3", "--lr=0.05"]
    torch.save({**state, "epoch": 1, "step": 3}, tmp_path / "older.pth.tar")
    with pytest.raises(UserError, match="--resume: .*older.pth.tar .* ends at step 3 of 5 of epoch 2; .*--pretrained"):
        PROGRAM.check(words)
    with pytest.raises(NothingToDo):
        PROGRAM.check([*words, "--max-steps=8"])
    for end in ({"epoch": 1, "step": 5}, {"epoch": 2, "step": 0}):
        torch.save({**state, **end}, tmp_path / "older.pth.tar")
        note = PROGRAM.prepare(*PROGRAM.parse(words)).notes[-1]
        assert note.startswith("note: --resume: ") and note.endswith("the epochs from here on have the new order")


@pytest.mark.parametrize("before", [None, "fast 00000000"])
def test_another_decoder_than_before_is_named(images, complete, tmp_path, capsys, before):
    state = torch.load(complete / "checkpoint.pth.tar")
    assert state.pop("decoder") == augment.decoder_fingerprint("auto")  # checkpoints of earlier versions have none
    torch.save(state | ({"decoder": before} if before else {}), tmp_path / "older.pth.tar")
    words = ["--data", str(images), "--resume", str(tmp_path / "older.pth.tar"), "--output-dir", str(tmp_path / "run")]
    PROGRAM.main([*words, "--epochs=3", "--max-steps=11", "--lr=0.05"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "decoded" in line]
    now = augment.decoder_fingerprint("auto")
    assert line == f"resume: training images are decoded by {now}, before by {before or 'pil'}; pixels may differ"


@pytest.mark.parametrize(
    ("optimizer", "changes", "groups"),
    [
        ("sgd", ["--momentum=0.5", "--weight-decay=0.3"], [dict(momentum=0.5, weight_decay=0.3)] * 2),
        (
            "adamw",
            ["--momentum=0.5", "--weight-decay=0.3", "--no-decay-norm"],
            [dict(betas=[0.5, 0.999], weight_decay=decay) for decay in (0.3, 0.0)],
        ),
        ("rmsprop", ["--momentum=0.5"], [dict(momentum=0.5)] * 2),
    ],
)
def test_changed_options_of_the_optimizer_take_effect(images, tmp_path, optimizer, changes, groups):
    """RMSprop has no momentum buffers where --momentum was 0 before."""
    begin = ["--momentum=0"] if optimizer == "rmsprop" else []
    words = ["--data", str(images), "--output-dir", str(tmp_path / "run"), f"--optimizer={optimizer}", "--resume=auto"]
    PROGRAM.main([*words, *begin, "--max-steps=2"])
    first = torch.load(tmp_path / "run" / "checkpoint.pth.tar")
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    PROGRAM.main([*words, *changes, "--max-steps=4"])
    words[3] = str(tmp_path / "same")
    PROGRAM.main([*words, *begin, "--max-steps=4"])
    changed, same = (torch.load(tmp_path / name / "checkpoint.pth.tar") for name in ("run", "same"))
    for group, expected in zip(changed["optimizer"]["param_groups"], groups, strict=True):
        assert {name: group[name] for name in expected} == expected
    assert same["optimizer"]["param_groups"] == first["optimizer"]["param_groups"]
    weights = [torch.cat([each.flatten() for each in state["state_dict"].values()]) for state in (changed, same)]
    assert not torch.equal(*weights)


def test_a_recipe_of_another_optimizer_is_named(images, tmp_path, monkeypatch):
    """The recipe was forgotten when the run was resumed."""
    other = dataclasses.replace(PROGRAM.recipes["default"].config, optimizer="adamw", recipe="other")
    recipes = {**PROGRAM.recipes, "other": dataclasses.replace(PROGRAM.recipes["default"], config=other)}
    monkeypatch.setattr(PROGRAM, "recipes", recipes)
    words = ["--data", str(images), "--output-dir", str(tmp_path / "run"), "--resume=auto"]
    PROGRAM.main([*words, "--recipe=other", "--max-steps=2"])
    before = contents(tmp_path / "run")
    found = r"--optimizer: sgd \(--recipe default\), but the checkpoint .* has adamw; give --recipe other"
    with pytest.raises(UserError, match=found):
        PROGRAM.prepare(*PROGRAM.parse([*words, "--max-steps=4"]))
    assert contents(tmp_path / "run") == before
    PROGRAM.main([*words, "--recipe=other", "--max-steps=4"])


def test_the_best_epoch_is_forgotten_where_the_validation_images_changed(images, complete, tmp_path, capsys):
    """Its accuracy was measured on other images."""
    shutil.copytree(images, tmp_path / "data")
    shutil.copytree(complete, tmp_path / "run")
    for path in sorted((tmp_path / "data" / "val").glob("*/*"))[1::2]:
        path.unlink()
    state = torch.load(tmp_path / "run" / "checkpoint.pth.tar")
    torch.save({**state, "best_acc1": 100.0}, tmp_path / "run" / "checkpoint.pth.tar")
    words = ["--output-dir", str(tmp_path / "run"), "--resume=auto", "--lr=0.05"]
    PROGRAM.main(["--data", str(images), *words, "--epochs=3"])
    assert "val/" not in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "checkpoint.pth.tar")["best_acc1"] == 100
    PROGRAM.main(["--data", str(tmp_path / "data"), *words, "--epochs=4"])
    assert "note: --resume: val/ holds other images than before" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    best = torch.load(tmp_path / "run" / "model_best.pth.tar")
    assert (best["best_epoch"], best["best_acc1"]) == (4, found["acc1"])
