"""--freeze, --freeze-norm and --head-lr-scale: what stays as it was, what is trained, and that a resumed run agrees."""

import pytest
import torch
from support import LAUNCH_TINY, final, run_differences
from tiny import PROGRAM, SPEC

from common.errors import UserError
from common.train.freeze import frozen_names

# Three micro-batches: a mean of three equal statistics may round.
OPTIONS = ["--freeze=stem.3", "--accumulate=3", "--ema=0.9", "--epochs=2", "-p", "4", "--head-lr-scale=3"]
KEPT = ("stem.0.", "stem.1.")  # the first convolution and its batch norm


@pytest.fixture
def tune(images, weights, tmp_path):
    """tune(name, *options) -> run folder; in this process."""

    def start(name, *options):
        words = ["--data", str(images), "--output-dir", str(tmp_path / name), "--pretrained", str(weights)]
        PROGRAM.main([*words, *options])
        return tmp_path / name

    return start


def changed(state, before):
    """Names of the entries that differ from the weights that training started from."""
    return {key for key, value in state.items() if key in before and not torch.equal(value, before[key])}


def num_parameters(optimizer):
    """Tensors that an optimizer updates; all of them have state."""
    number = sum(len(group["params"]) for group in optimizer["param_groups"])
    assert number == len(optimizer["state"])
    return number


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        ("none", []),
        ("stem.0", []),
        ("stem.3", ["stem.0", "stem.1", "stem.2"]),
        ("fc", ["stem", *(f"stem.{i}" for i in range(6)), "head", "dropout"]),
        ("head", ["stem", *(f"stem.{i}" for i in range(6)), "head", "dropout"]),
    ],
)
def test_a_block_freezes_what_precedes_it(freeze, expected):
    assert frozen_names(SPEC.build(), SPEC, freeze) == expected


def test_an_unknown_block_is_an_error_that_lists_the_known(images, weights):
    with pytest.raises(UserError) as error:
        PROGRAM.prepare(*PROGRAM.parse(["--data", str(images), "--pretrained", str(weights), "--freeze=stem.2"]))
    known = "stem.0, stem.1, stem.3, stem.4, head, fc"
    assert str(error.value) == f"--freeze: stem.2, must be none, head or a block of tiny: {known}"
    with pytest.raises(
        UserError, match="--freeze: head needs weights to keep .a recipe may set it.; give --pretrained FILE"
    ):
        PROGRAM.prepare(*PROGRAM.parse(["--data", str(images), "--freeze=head"]))


@pytest.mark.parametrize("reduce", ["fast", "exact"])
def test_frozen_weights_and_statistics_keep_their_bits(weights, tune, reduce):
    state, before = final(tune("run", *OPTIONS, f"--reduce={reduce}")), final(weights.parent)["state_dict"]
    for found in (state["state_dict"], state["ema_state_dict"]):
        assert changed(found, before) == {key for key in before if not key.startswith(KEPT)}
    # Two convolutions and norms have 3 parameters each; of them stem.3 and stem.4 are trained, and two heads.
    assert num_parameters(state["optimizer"]) == 3 + 4


def test_all_but_the_classifier(weights, tune, capsys):
    """The auxiliary head, which could train nothing, is left out of the network."""
    state, before = final(tune("run", "--freeze=head", "--epochs=1")), final(weights.parent)["state_dict"]
    assert "--freeze: head keeps 1,416 of 1,467 parameters and their batch norms" in capsys.readouterr().out
    assert changed(state["state_dict"], before) == {"fc.weight", "fc.bias"}
    assert not state["build"]["aux"] and num_parameters(state["optimizer"]) == 2
    assert before.keys() - state["state_dict"].keys() == {"head.weight", "head.bias"}


def test_freeze_norm_keeps_statistics_and_trains_weights(weights, tune):
    state, before = final(tune("run", "--freeze-norm", "--epochs=1")), final(weights.parent)["state_dict"]
    statistics = {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert len(statistics) == 6 and changed(state["state_dict"], before) == before.keys() - statistics


def test_a_resumed_run_keeps_what_is_frozen_and_ends_with_the_same_bits(images, tune, tmp_path):
    whole, part = tune("whole", *OPTIONS), tune("part", *OPTIONS, "--max-steps=3")
    words = ["--data", str(images), "--output-dir", str(part), "--resume=auto", "--epochs=2", "--ema=0.9"]
    PROGRAM.main([*words, "--accumulate=3"])
    assert run_differences(whole, part) == []
    with pytest.raises(UserError, match=r"--freeze: none, but the checkpoint .* has stem\.3; keep it, or start"):
        PROGRAM.prepare(*PROGRAM.parse([*words, "--epochs=3", "--freeze=none"]))


def test_ranks_that_average_gradients_keep_the_frozen_bits(images, weights, run, tmp_path):
    keys = [f"--data_path={images}", "--device=cpu", "--devices=2", f"--output_dir={tmp_path / 'two'}"]
    run(*LAUNCH_TINY, *keys, "--", "--pretrained", weights, "--freeze=stem.3", "--epochs=1", "--accumulate=3")
    before = final(weights.parent)["state_dict"]
    assert changed(final(tmp_path / "two")["state_dict"], before) == {k for k in before if not k.startswith(KEPT)}


def test_the_head_has_its_own_learning_rate_at_every_step(weights, tune):
    """One step of plain SGD: the classifier moves four times as far, everything else as before."""
    plain = [
        "--momentum=0",
        "--wd=0",
        "--lr-schedule=cosine-step",
        "--warm-up-epochs=1",
        "--dropout=0",
        "--max-steps=1",
    ]
    before = final(weights.parent)["state_dict"]
    one, four = (final(tune(f"by {scale}", *plain, f"--head-lr-scale={scale}")) for scale in (1, 4))
    for key in ("stem.0.weight", "fc.weight", "head.bias"):
        by = 4 if key.startswith(SPEC.classifiers) else 1
        move, expected = four["state_dict"][key] - before[key], by * (one["state_dict"][key] - before[key])
        assert expected.abs().max() > 1e-4 and torch.allclose(move, expected, atol=1e-6), key
    rates = [group["lr"] for group in four["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.02, 0.02, 0.08])  # the first of five warm-up steps to 0.1


def test_a_new_classifier_is_small_and_depends_on_the_seed(images, weights, tmp_path):
    def classifier(seed):
        words = ["--data", str(images), "--pretrained", str(weights), "-p", "200", f"--seed={seed}"]
        return PROGRAM.prepare(*PROGRAM.parse(words)).weights["fc.weight"]

    assert float(classifier(0).std()) == pytest.approx(0.01, rel=0.1)
    assert torch.equal(classifier(1), classifier(1)) and not torch.equal(classifier(0), classifier(1))
