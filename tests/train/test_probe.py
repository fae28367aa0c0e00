"""--cache-features: what the classifier is trained on, what is cached, and that eval.py agrees with the result."""

import dataclasses
import hashlib
import os
import shutil
import signal

import pytest
import torch
from support import differences, final, metrics_of
from tiny import PROGRAM, SPEC

from common.cli import flag_of
from common.config import PROBE as RECIPE_PROBE
from common.config import TrainConfig
from common.data.transforms import eval_transform
from common.errors import UserError
from common.evaluation.program import EvalConfig, evaluate_folder
from common.train.probe import ProbeTrainer, _ClassifierTrainer
from common.train.program import TrainProgram
from common.weights.load import load_model

PROBE = ["--freeze=head", "--cache-features", "--optimizer=adamw", "--lr=0.05", "--epochs=30", "--dropout=0"]


@pytest.fixture
def probe(images, weights, tmp_path, monkeypatch):
    """probe(name, *options) -> run folder; with a feature cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def start(name, *options, data=images, pretrained=weights):
        words = ["--data", str(data), "--output-dir", str(tmp_path / name), "--pretrained", str(pretrained)]
        PROGRAM.main([*words, *PROBE, *options])
        return tmp_path / name

    return start


def test_only_the_classifier_changes_and_eval_counts_the_same(images, weights, probe):
    folder = probe("run", "-p", "3")
    state, before = final(folder), final(weights.parent)["state_dict"]
    assert {key for key, value in state["state_dict"].items() if not torch.equal(value, before[key])} == {
        "fc.weight",
        "fc.bias",
    }
    assert len(state["optimizer"]["state"]) == 2
    (record,) = (record for record in metrics_of(folder) if record["kind"] == "val")
    config = EvalConfig(data=str(images), resume=str(folder / "model_best.pth.tar"), device="cpu", workers=0)
    counts, _ = evaluate_folder(SPEC, config)
    assert record["correct"] == counts.correct.tolist() and record["seen"] == counts.seen == 21
    assert record["acc1"] > 60  # 33 is chance


def test_a_step_takes_every_image_and_its_mirror_image(images, weights, probe):
    """The loss of the first step against the network applied to each image by itself."""
    from PIL import Image

    folder = probe("run", "--max-steps=1", "--label-smoothing=0.1", "--print-freq=1")
    model, _ = load_model(weights, SPEC)
    transform, losses = eval_transform(SPEC), []
    for label, name in enumerate(("ant", "bee", "cat")):
        for path in (images / "train" / name).iterdir():
            pixels = torch.tensor(transform(Image.open(path))).permute(2, 0, 1)[None] / 255
            for image in (pixels, pixels.flip(3)):
                with torch.no_grad():
                    logits = model((image - 0.5) / 0.5)
                loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label]), label_smoothing=0.1)
                losses.append(loss.item())
    logged = next(record["loss"] for record in metrics_of(folder) if record["kind"] == "train")
    assert len(losses) == 120 and logged == pytest.approx(sum(losses) / 120, rel=1e-5)


def test_features_are_computed_once(images, probe, tmp_path, monkeypatch, capsys):
    computed = []
    compute = ProbeTrainer._compute
    monkeypatch.setattr(
        ProbeTrainer, "_compute", lambda *args: computed.append(args[1].root.rpartition("/")[2]) or compute(*args)
    )
    data = tmp_path / "data"
    shutil.copytree(images, data)
    first, second = probe("first", data=data), probe("second", "--seed=0", data=data)
    assert computed == ["train", "val"] and differences(final(first)["state_dict"], final(second)["state_dict"]) == []
    assert "train: 120 samples, from the cache" in capsys.readouterr().out
    probe("another seed", "--seed=1", "-p", "5", data=data)
    assert computed == ["train", "val"]
    os.utime(data / "val" / "bee" / "0001.jpg", (1, 1))  # a file was replaced
    probe("another file", data=data)
    assert computed == ["train", "val", "val"]
    probe("another size", "--image-size=48", data=data)
    probe("other weights", data=data, pretrained=_moved(tmp_path, first))
    assert computed[3:] == ["train", "val"] * 2
    options = {**SPEC.build_options, "pool_padding": "torch"}  # of which the weights do not tell
    builder = lambda pool_padding, **others: SPEC.builder(**others)  # noqa: E731
    monkeypatch.setattr(PROGRAM, "spec", dataclasses.replace(SPEC, builder=builder, build_options=options))
    probe("a pooling", "--max-steps=1", data=data)
    probe("another pooling", "--max-steps=1", "--pool-padding=same", data=data)
    assert computed[7:] == ["train", "val"] * 2


def _moved(tmp_path, folder):
    """A checkpoint of a run whose first convolution differs."""
    state = final(folder)
    state["state_dict"]["stem.0.weight"] += 0.1
    torch.save(state, tmp_path / "moved.pth.tar")
    return tmp_path / "moved.pth.tar"


def test_a_resumed_probe_ends_with_the_same_bits(images, probe, tmp_path):
    whole, part = probe("whole", "--ema=0.9"), probe("part", "--ema=0.9", "--max-steps=7")
    words = ["--data", str(images), "--output-dir", str(part), "--resume=auto", "--epochs=30", "--ema=0.9"]
    PROGRAM.main([*words, "--optimizer=adamw", "--lr=0.05"])
    keys = ("state_dict", "ema_state_dict", "optimizer", "epoch", "step")
    assert differences({k: final(whole)[k] for k in keys}, {k: final(part)[k] for k in keys}) == []


def test_head_init_starts_with_the_classifier_of_a_probe(images, weights, probe, tmp_path, capsys):
    """The options of the recipe probe, whatever those of the run are; a resumed run does not train it again."""
    own = [f"{flag_of(TrainConfig.__dataclass_fields__[key])}={value}" for key, value in RECIPE_PROBE.items()]
    own = [word for word in own if "=True" not in word]
    found = final(probe("probe", *own, "--lr-schedule=cosine-step"))["state_dict"]
    words = ["--data", str(images), "--output-dir", str(tmp_path / "run"), "--lr=1e-9", "--epochs=1", "--mixup=0.2"]
    more = ["--ema=0.5", "--head-lr-scale=10", "--head-init=probe", "--freeze-norm", "--freeze=stem.3"]
    PROGRAM.main([*words, *more, "--pretrained", str(weights), "--max-steps=2"])
    state, before = final(tmp_path / "run"), final(weights.parent)["state_dict"]
    for key, value in state["state_dict"].items():
        start = found if key.startswith("fc.") else before
        assert torch.allclose(value, start[key], rtol=1e-4, atol=1e-6), key
    assert not torch.allclose(found["fc.weight"], before["fc.weight"], rtol=0.1)
    line = "--head-init: the classifier was trained alone for 200 steps, to a loss of "
    assert line in capsys.readouterr().out
    assert not [record for record in metrics_of(tmp_path / "run") if record["step"] > 5]
    PROGRAM.main([*words, *more, "--resume=auto"])
    assert line not in (out := capsys.readouterr().out) and "before" not in out.replace("before 2", "", 1)
    with pytest.raises(UserError, match="^--head-init: probe, needs trained weights; give --pretrained FILE"):
        PROGRAM.prepare(*PROGRAM.parse(["--data", str(images), "--head-init=probe"]))


def test_head_init_names_weights_that_diverged(images, weights, tmp_path, capsys):
    state = final(weights.parent)
    state["state_dict"]["stem.0.weight"][:] = 1e38
    torch.save(state, tmp_path / "huge.pth.tar")
    words = [
        "--data",
        str(images),
        "--output-dir",
        str(tmp_path / "run"),
        "--pretrained",
        str(tmp_path / "huge.pth.tar"),
    ]
    with pytest.raises(SystemExit, match="2"):
        PROGRAM.main([*words, "--head-init=probe"])
    reason = "the loss of the classifier is nan; the weights of --pretrained diverged"
    assert capsys.readouterr().err == f"error: --head-init: {reason}\n"


@pytest.mark.parametrize(
    ("trainer", "name", "number", "status"),
    [
        (ProbeTrainer, "_compute", signal.SIGTERM, "143"),
        (ProbeTrainer, "_compute", signal.SIGINT, "130"),
        (_ClassifierTrainer, "_features", signal.SIGTERM, "143"),  # before the steps
        (_ClassifierTrainer, "classifier", signal.SIGINT, "130"),  # after them
    ],
)
def test_a_signal_during_head_init_ends_the_run(trainer, name, number, status, images, weights, tmp_path, monkeypatch):
    function = getattr(trainer, name)

    def interrupted(self, *args, **options):
        if name == "_compute":
            signal.raise_signal(number)
            return function(self, *args, **options)
        found = function(self, *args, **options)
        signal.raise_signal(number)
        return found

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trainer, name, interrupted)
    words = ["--data", str(images), "--output-dir", str(tmp_path / "run"), "--pretrained", str(weights)]
    with pytest.raises(SystemExit, match=status):
        PROGRAM.main([*words, "--head-init=probe"])
    assert not list((tmp_path / "run").glob("*.tar"))
    assert "stopped before the first step; nothing is saved" in (tmp_path / "run" / "log.txt").read_text()


def test_a_broken_image_can_be_skipped(images, probe, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    for part in ("train", "val"):
        (data / part / "bee" / "0003.jpg").write_bytes(b"no image")
    for name in ("computed", "cached"):
        probe(name, "--on-bad-image=skip", data=data)
        assert "train: 118 samples" in (out := capsys.readouterr().out) and "(20 images, 1 skipped)" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--freeze=stem.3"], "--cache-features: needs --freeze head, not stem.3"),
        (["--mixup=0.2"], "--mixup: 0.2, has no effect with --cache-features; leave it out"),
        (["-b", "12"], "--batch-size: has no effect with --cache-features, a step takes all images; leave it out"),
    ],
)
def test_options_without_effect_are_errors(images, weights, options, message):
    with pytest.raises(UserError) as error:
        words = ["--data", str(images), "--pretrained", str(weights), *PROBE, *options]
        PROGRAM.prepare(*PROGRAM.parse(words))
    assert str(error.value) == message


def test_two_ranks_are_refused(images, weights):
    words = ["--data", str(images), "--pretrained", str(weights), *PROBE]
    with pytest.raises(UserError, match="--devices: 2 ranks cannot share 1 micro-batches of 60 images"):
        PROGRAM.check(words, 2, 1)


# ---- --pretrained NAME, the recipes ----------------------------------------------------------------------------------


def test_public_weights_are_downloaded_by_name(images, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    source = shutil.copy(weights, tmp_path / f"tiny-{digest}.pth")
    spec = dataclasses.replace(SPEC, weight_urls=(f"file://{source}",), weight_names=("zoo",))
    program = TrainProgram(spec, PROGRAM.recipes, "")
    setup = program.prepare(*program.parse(["--data", str(images), "--pretrained=zoo"]))
    assert torch.equal(setup.weights["stem.0.weight"], final(weights.parent)["state_dict"]["stem.0.weight"])
    assert (tmp_path / "hub" / "hub" / "checkpoints" / f"tiny-{digest}.pth").exists()

    program.spec = dataclasses.replace(spec, weight_urls=("file:///nowhere/tiny-00000000.pth",))
    with pytest.raises(UserError) as error:
        program.prepare(*program.parse(["--data", str(images), "--pretrained=zoo"]))
    assert str(error.value).startswith("--pretrained: the public file could not be downloaded: file:///nowhere/")
    assert "download tiny-00000000.pth on another machine and pass it with --pretrained, or put it at" in str(
        error.value
    )
    with pytest.raises(UserError, match="--pretrained: zo is not a file; give .* or zoo for the public weights"):
        program.prepare(*program.parse(["--data", str(images), "--pretrained=zo"]))


def test_the_default_recipe_names_those_for_fine_tuning(images, weights):
    config = PROGRAM.recipes["default"]
    tuned = dataclasses.replace(config, config=dataclasses.replace(config.config, freeze="stem.3"))
    program = TrainProgram(SPEC, {"default": config, "finetune": tuned}, "")

    def notes(*options):
        setup = program.prepare(*program.parse(["--data", str(images), "--pretrained", str(weights), *options]))
        return [note for note in setup.notes if "recipe" in note]

    assert notes() == [
        "note: the recipe default is for training from scratch; for weights of --pretrained and 60 images there are "
        "--recipe finetune"
    ]
    assert notes("--recipe=finetune") == notes("--freeze=head") == []
