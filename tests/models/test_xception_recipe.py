"""Xception's recipe: learning rates and loss against the formulas written out, optimizer, data, names, lines."""

import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import augment
from common.device import device as devices
from common.errors import UserError
from common.evaluation.metrics import Counts
from common.train import optim, schedules
from common.train.meters import TimeLeft, TrainMetrics
from xception.src import config, dataset, lr_generator, run_log
from xception.src.loss import CrossEntropySmooth

RATES = {"lr_init": 4e-5, "lr_max": 0.4, "lr_end": 4e-5}


def rates(mode, steps_per_epoch, epochs=250, warm_up_epochs=1):
    """The whole list of a run."""
    total, warm = steps_per_epoch * epochs, steps_per_epoch * warm_up_epochs
    return [lr_generator.MODES[mode](i, total, warm, **RATES) for i in range(total)]


@pytest.mark.parametrize("steps", [5, 1251])
def test_linear(steps):
    lr, total = rates("linear", steps), 250 * steps
    assert lr[0] == 4e-5
    assert lr[1] == pytest.approx(4e-5 + (0.4 - 4e-5) / steps)
    assert lr[steps - 1] == pytest.approx(0.4 - (0.4 - 4e-5) / steps)
    assert lr[steps] == 0.4
    assert lr[steps + 249 * steps // 2] == pytest.approx(0.4 - (0.4 - 4e-5) * (249 * steps // 2) / (249 * steps))
    assert lr[total - 1] == pytest.approx(4e-5 + (0.4 - 4e-5) / (249 * steps))


@pytest.mark.parametrize("steps", [5, 1251])
def test_steps(steps):
    lr, total = rates("steps", steps), 250 * steps
    assert lr[0] == 0.4  # no warm-up
    for edge, before, after in ((0.3, 0.4, 0.04), (0.6, 0.04, 0.004), (0.8, 0.004, 0.0004)):
        i = math.ceil(edge * total)
        assert lr[i - 1] == pytest.approx(before)
        assert lr[i] == pytest.approx(after)
    assert lr[total - 1] == pytest.approx(0.0004)


@pytest.mark.parametrize("steps", [5, 1251])
def test_poly(steps):
    lr, total = rates("poly", steps), 250 * steps
    assert lr[0] == 4e-5
    assert lr[steps - 1] == pytest.approx(0.4 - (0.4 - 4e-5) / steps)
    assert lr[steps] == 0.4
    assert lr[100 * steps] == pytest.approx(0.4 * (150 / 249) ** 2)
    assert lr[total - 1] == pytest.approx(0.4 * (1 / (249 * steps)) ** 2)


@pytest.mark.parametrize("steps", [5, 1251])
def test_cosine(steps):
    lr, total = rates("cosine", steps), 250 * steps
    assert lr[0] == pytest.approx(4e-5 + (0.4 - 4e-5) / steps)
    assert lr[steps - 1] == pytest.approx(0.4)
    decay = 249 * steps
    assert lr[steps] == pytest.approx(0.4 * (0.5 * (1 + math.cos(0.94 * math.pi * steps / decay)) + 1e-5))
    i = 125 * steps
    assert lr[i] == pytest.approx(0.4 * ((125 / 249) * 0.5 * (1 + math.cos(0.94 * math.pi * 125 / 249)) + 1e-5))
    end = 0.5 * (1 + math.cos(0.94 * math.pi * (total - 1) / decay))
    assert lr[total - 1] == pytest.approx(0.4 * (end / decay + 1e-5))


def test_without_warm_up_the_first_rate_is_the_maximum():
    assert rates("linear", 5, warm_up_epochs=0)[0] == rates("poly", 5, warm_up_epochs=0)[0] == 0.4


def test_liner_is_linear_and_says_so_and_other_words_are_errors():
    said = []
    assert lr_generator.mode("liner", said.append) == "linear"
    assert said == ["lr_decay_mode: 'liner' is read as 'linear'"]
    assert lr_generator.mode("poly", said.append) == "poly"
    assert len(said) == 1
    with pytest.raises(UserError, match="--lr-decay-mode: exponential, must be one of linear, steps, poly, cosine"):
        lr_generator.mode("exponential")


def test_label_files_are_not_read():
    with pytest.raises(UserError, match="--label-numbers: from-1, but --eval-path holds class folders, no label file"):
        dataclasses.replace(config.GPU, label_numbers="from-1")


def test_smoothing_by_hand():
    """Three classes, factor 0.1: targets 0.9 and twice 0.05."""
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    log_p = [[x - math.log(sum(math.exp(y) for y in row)) for x in row] for row in logits.tolist()]
    expected = (
        -(
            0.9 * log_p[0][0]
            + 0.05 * log_p[0][1]
            + 0.05 * log_p[0][2]
            + 0.05 * log_p[1][0]
            + 0.9 * log_p[1][1]
            + 0.05 * log_p[1][2]
        )
        / 2
    )
    assert float(CrossEntropySmooth(logits, torch.tensor([0, 1]), 0.1)) == pytest.approx(expected, rel=1e-6)
    plain = -(log_p[0][0] + log_p[1][1]) / 2
    assert float(CrossEntropySmooth(logits, torch.tensor([0, 1]), 0.0)) == pytest.approx(plain, rel=1e-6)


# ---- recipes, optimizer, data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "batch_size", "path", "mode"),
    [(config.ASCEND, 128, "./", "liner"), (config.GPU, 64, "./gpu-ckpt", "linear")],
)
def test_recipes_have_the_documented_values(recipe, batch_size, path, mode):
    assert (recipe.batch_size, recipe.save_checkpoint_path, recipe.lr_schedule) == (batch_size, path, mode)
    assert (recipe.num_classes, recipe.loss_scale, recipe.momentum, recipe.weight_decay) == (1000, "1024", 0.9, 1e-4)
    assert (recipe.epochs, recipe.warm_up_epochs, recipe.finish_epoch) == (250, 1, 0)
    assert (recipe.save_checkpoint, recipe.save_checkpoint_epochs, recipe.keep_checkpoint_max) == (True, 1, 5)
    assert (recipe.use_label_smooth, recipe.label_smoothing) == (True, 0.1)
    assert (recipe.lr_init, recipe.lr, recipe.lr_end) == (4e-5, 0.4, 4e-5)


def test_the_trainer_uses_the_learning_rates_of_the_recipe():
    lr = schedules.make(config.ASCEND, 1251, lr_generator.SCHEDULES)
    assert lr(0, 0) == 4e-5
    assert lr(1, 0) == 0.4
    assert lr(249, 1250) == rates("linear", 1251)[-1]
    cosine = dataclasses.replace(config.GPU, lr_schedule="cosine", epochs=10)
    assert schedules.make(cosine, 5, lr_generator.SCHEDULES)(7, 3) == rates("cosine", 5, epochs=10)[38]


def test_weight_decay_skips_batch_norm_alone():
    """MindSpore leaves out gamma and beta; the classifier's bias decays."""
    model = config.SPEC.build(num_classes=2)
    groups = optim.make_optimizer(model, config.ASCEND, devices.Device("cpu")).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    norms = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for part in ("weight", "bias")
    }
    assert len(decay) == len(names)
    assert {name for name, value in decay.items() if value == 0} == norms
    assert {value for name, value in decay.items() if name not in norms} == {1e-4}
    assert decay["fc.bias"] == 1e-4


def test_brightness_jitter_is_uniform_from_06_to_14():
    """On a gray image contrast and saturation change nothing, so the level shows the brightness factor alone."""
    transform = augment.TrainTransform(dataclasses.replace(config.GPU, image_size=32))
    gray = Image.new("RGB", (32, 32), (100, 100, 100))
    factors = []
    for seed in range(500):
        torch.manual_seed(seed)
        factors.append(transform.from_image(gray)[0, 0, 0] / 100)
    factors = np.sort(factors)
    assert 0.6 <= factors[0] < 0.62
    assert 1.38 < factors[-1] <= 1.4
    uniform = (factors - 0.6) / 0.8
    assert np.abs(uniform - np.arange(1, 501) / 500).max() < 1.63 / 500**0.5  # Kolmogorov-Smirnov, 1 %


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, level in (("ants", 40), ("bees", 200)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (320 + 8 * i, 330), (level, 10 * i, 90)).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path / "train"


def test_create_dataset_seeds_itself(photos):
    def first_batch(**options):
        torch.manual_seed(np.random.default_rng().integers(1 << 30))  # the caller's state does not matter
        batch = next(dataset.create_dataset(photos, do_train=True, batch_size=4, workers=0, **options).epoch(0))
        return batch.pixels_NHWC

    assert first_batch().shape == (4, 299, 299, 3)
    assert torch.equal(first_batch(), first_batch())
    assert not torch.equal(first_batch(), first_batch(seed=2))


def test_create_dataset_evaluates_every_image_cut_as_published(photos):
    batches = list(dataset.create_dataset(photos, do_train=False, batch_size=4, workers=0))
    assert [len(batch.labels_N) for batch in batches] == [4, 2]
    assert batches[0].labels_N.tolist() == [0, 0, 0, 1]
    # 320 x 330 stays as it is; the crop of 299 begins at (10, 15).
    assert (config.SPEC.resize_for(299), config.SPEC.crop_rounding) == (320, "floor")
    assert batches[0].pixels_NHWC[0].tolist() == np.full((299, 299, 3), (40, 0, 90)).tolist()


# ---- checkpoints by name ---------------------------------------------------------------------------------------------


def saver(folder, monkeypatch, resume=None, run=None, **options):
    """A report in `folder`, and a function that ends epochs; in the folder `run` or a new one."""
    monkeypatch.chdir(folder)
    run = folder / (run or f"run{len(list(folder.iterdir()))}")
    run.mkdir(exist_ok=True)
    (run / "checkpoint.pth.tar").write_text("weights")
    setup = types.SimpleNamespace(config=dataclasses.replace(config.GPU, resume=resume or "", **options), state=resume)
    logger = run_log.XceptionLogger(run, setup)
    return lambda epoch: logger.epoch_saved(run / "checkpoint.pth.tar", epoch, 20)


def names(folder):
    return sorted((path.name for path in (folder / "gpu-ckpt").iterdir()), key=lambda name: (len(name), name))


def test_the_last_five_checkpoints_stay(tmp_path, monkeypatch):
    save = saver(tmp_path, monkeypatch)
    for epoch in range(1, 8):
        save(epoch)
    assert names(tmp_path) == [f"Xception-rank0-{epoch}_20.ckpt" for epoch in (3, 4, 5, 6, 7)]
    resumed = saver(tmp_path, monkeypatch, resume="gpu-ckpt/Xception-rank0-7_20.ckpt")
    resumed(8)
    assert names(tmp_path) == [f"Xception-rank0-{epoch}_20.ckpt" for epoch in (4, 5, 6, 7, 8)]


def test_a_second_run_removes_nothing_of_the_first(tmp_path, monkeypatch):
    for _ in range(3):
        save = saver(tmp_path, monkeypatch, keep_checkpoint_max=1)
        save(1)
        save(2)
    assert names(tmp_path) == ["Xception-rank0-2_20.ckpt", "Xception-rank0_1-2_20.ckpt", "Xception-rank0_2-2_20.ckpt"]
    monkeypatch.chdir(tmp_path)
    assert run_log.newest_checkpoint().name == "Xception-rank0_2-2_20.ckpt"


def test_a_run_that_is_resumed_keeps_to_its_own_files(tmp_path, monkeypatch):
    """Not those of the newest run in the folder, also where it was stopped before it had any."""
    saver(tmp_path, monkeypatch, run="a")(1)
    saver(tmp_path, monkeypatch, run="b")(1)
    saver(tmp_path, monkeypatch, run="c")
    saver(tmp_path, monkeypatch, run="a", resume="a/checkpoint.pth.tar", keep_checkpoint_max=1)(2)
    saver(tmp_path, monkeypatch, run="c", resume="auto")(1)
    first, *others = ["Xception-rank0-2_20.ckpt", "Xception-rank0_1-1_20.ckpt", "Xception-rank0_2-1_20.ckpt"]
    assert names(tmp_path) == [first, *others]
    saver(tmp_path, monkeypatch, run="d", resume="gpu-ckpt/Xception-rank0_1-1_20.ckpt")(2)
    saver(tmp_path, monkeypatch, run="d", resume="auto")(3)
    assert [name for name in names(tmp_path) if "_1-" in name] == [f"Xception-rank0_1-{k}_20.ckpt" for k in (1, 2, 3)]


def test_two_runs_at_once_in_one_folder(tmp_path, monkeypatch, capsys):
    """Both have reached the end of an epoch before one has written a checkpoint; one says that they share a log file."""
    first, second = (saver(tmp_path, monkeypatch) for _ in range(2))
    assert capsys.readouterr().out == (
        f"note: another run writes {tmp_path}/log_gpu.txt too, so lines of both are in it; {tmp_path}/run2/log.txt has "
        "those of this run alone\n"
    )
    found = ["Xception-rank0", "Xception-rank0", "Xception-rank0_1"]
    monkeypatch.setattr(run_log, "_new_prefix", lambda *args: found.pop(0))
    first(1)
    second(1)
    assert names(tmp_path) == ["Xception-rank0-1_20.ckpt", "Xception-rank0_1-1_20.ckpt"] and not found


def test_save_checkpoint_epochs_and_off(tmp_path, monkeypatch):
    save = saver(tmp_path, monkeypatch, save_checkpoint_epochs=2)
    for epoch in (1, 2, 3, 4):
        save(epoch)
    assert names(tmp_path) == ["Xception-rank0-2_20.ckpt", "Xception-rank0-4_20.ckpt"]
    saver(tmp_path, monkeypatch, save_checkpoint=False)(5)
    assert len(names(tmp_path)) == 2


def test_the_lines_of_an_epoch(tmp_path, monkeypatch, capsys):
    """The golden lines of the package's log, down to the printing of a float32."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    logger = run_log.XceptionLogger(tmp_path / "run", types.SimpleNamespace(config=config.ASCEND, state=None))
    clock = iter([100.0, 801.24235])
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: next(clock))
    logger.epoch_started(0, 0, 1251)
    logger.progress(0, 250, 1251, 1251, TrainMetrics(5.0, 3.0, 4.84274435, 0.4), 1826.0, TimeLeft(0, 86400))
    assert capsys.readouterr().out.splitlines() == [
        "lr_decay_mode: 'liner' is read as 'linear'",
        "epoch: 1 step: 1251, loss is 4.8427444",
        "epoch time: 701242.350 ms, per step time: 560.545 ms",
        "time left: 1 day, 0:00:00 of the run",
    ]
    counts = Counts(seen=49920, loss_sum=1.7797744848789312 * 49920)
    counts.correct[:] = (39865, 0, 0, 0, 47353)
    line = run_log.result_line(counts)
    assert line == f"result: {{'Loss': {counts.loss}, 'Top_1_Acc': {39865 / 49920}, 'Top_5_Acc': {47353 / 49920}}}"
    assert "'Top_1_Acc': 0.79857772" in line
