"""The recipes finetune and probe of each network, and both on real photographs with real weights."""

import pytest
import torch
from support import REAL_DATA, final, metrics_of

from common.evaluation.program import EvalConfig, evaluate_folder
from common.train import schedules
from common.train.freeze import frozen_names
from inception_v3.train import PROGRAM as V3
from tools import models

# The first and the last frozen module of finetune, and the first trained one: 17x17 or 19x19 maps become smaller there.
FINETUNE = {
    "inception_v3": ("Conv2d_1a_3x3", "Mixed_6e", "Mixed_7a"),
    "inception_v4": ("features.0", "features.17", "features.18"),
    "xception": ("conv1", "block11", "block12"),
}


@pytest.mark.parametrize("name", models.names())
def test_each_network_has_both_recipes(name):
    program = models.program(name)
    tune, probe = (program.recipes[recipe].config for recipe in ("finetune", "probe"))
    first, last, trained = FINETUNE[name]
    with torch.device("meta"):
        model = program.spec.build(**({"aux": False} if program.spec.aux_weight else {}))
    frozen = frozen_names(model, program.spec, tune.freeze)
    assert tune.freeze == trained and {first, last} <= set(frozen) and trained not in frozen
    assert set(frozen_names(model, program.spec, "head")) == {
        module for module, _ in model.named_modules() if module not in ("", program.spec.classifiers[0])
    }
    assert (tune.freeze_norm, tune.head_lr_scale, tune.num_classes) == (True, 10, None)
    assert (tune.head_init, tune.optimizer, tune.lr) == ("probe", "adamw", 5e-5)
    lr = schedules.make(tune, 10, program.extra_schedules)
    rates = [lr(epoch, step) for epoch in range(tune.epochs) for step in range(10)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] < tune.lr / 5 and 0.9 * tune.lr < max(rates) <= tune.lr * 1.001 and rates[-1] < tune.lr / 5
    assert (probe.freeze, probe.cache_features, probe.epochs, probe.lr) == ("head", True, 200, 0.01)
    assert (probe.optimizer, probe.label_smoothing, probe.dropout, probe.num_classes) == ("adamw", 0.1, 0.5, None)


@pytest.mark.parametrize("name", models.names())
def test_the_modern_recipe_of_each_network_is_for_1024_images_and_the_published_evaluation(name):
    program = models.program(name)
    recipe, default = program.recipes["modern"], next(iter(program.recipes.values())).config
    config = recipe.config
    assert (recipe.images_per_step, config.lr, config.epochs) == (1024, 0.5, 600)
    assert config.warm_up_epochs == 5 > default.warm_up_epochs
    assert config.image_size < config.eval_size == program.spec.input_size
    assert (config.auto_augment, config.mixup, config.cutmix) == ("trivialaugment", 0.2, 1.0)
    assert (config.random_erasing, config.repeated_aug, config.ema, config.label_smoothing) == (0.1, 4, 0.9999, 0.1)
    assert (config.weight_decay, config.decay_norm, config.smoothing_targets) == (2e-5, False, "all")
    # Rises over five epochs, then falls to about nothing.
    lr = schedules.make(config, 1000, program.extra_schedules)
    assert (
        lr(0, 0) < 0.001 and lr(2, 499) == pytest.approx(0.25, rel=0.01) and lr(4, 999) == pytest.approx(0.5, rel=0.01)
    )
    assert lr(300, 0) < 0.3 and lr(599, 999) < 0.001


@pytest.fixture(scope="module")
def google_weights():
    path = REAL_DATA.parent / "weights" / "inception_v3_imagenet2015.pth"
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


def start(ants_bees, weights, folder, *options):
    words = ["--data", str(ants_bees), "--pretrained", str(weights), "--transform-input", "--output-dir", str(folder)]
    V3.main([*words, "--device=cpu", "--workers=0", *options])
    return final(folder)


@pytest.mark.realdata
def test_a_probe_of_real_weights_tells_ants_from_bees(ants_bees, google_weights, tmp_path):
    """At 128 pixels, which these weights were not made for, with a third of the photographs."""
    start(ants_bees, google_weights, tmp_path / "run", "--recipe=probe", "--image-size=128")
    counts, _ = evaluate_folder(
        V3.spec,
        EvalConfig(data=str(ants_bees), resume=str(tmp_path / "run" / "model_best.pth.tar"), device="cpu", workers=0),
    )
    (record,) = (record for record in metrics_of(tmp_path / "run") if record["kind"] == "val")
    assert record["correct"] == counts.correct.tolist() and counts.seen == 52 and counts.percent(1) > 75


@pytest.mark.realdata
def test_fine_tuning_keeps_the_bits_below_mixed_7a_and_all_statistics(ants_bees, google_weights, tmp_path):
    options = ("--recipe=finetune", "--image-size=96", "--epochs=2", "--max-steps=2", "--lr=0.01")
    state = start(ants_bees, google_weights, tmp_path / "run", *options)
    before = torch.load(google_weights, weights_only=True)
    moved = {
        name
        for name, value in state["state_dict"].items()
        if not name.startswith("fc.") and not torch.equal(value, before[name].to(value.dtype))
    }
    trained = ("Mixed_7a.", "Mixed_7b.", "Mixed_7c.")
    weights = {name for name in before if name.startswith(trained) and name.endswith(("weight", "bias"))}
    assert moved == weights and not state["build"]["aux"]
