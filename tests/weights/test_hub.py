"""--to hub: timm opens the folder and gives the same logits."""

import json
import math

import pytest
import timm
import tiny
import torch
from support import ROOT, fill_closed_form

from common.errors import UserError
from common.weights import hub
from common.weights.load import load_model
from tools import models

SIZE = 107  # pixels
OPTIONS = {
    "inception_v3": {"aux": True, "transform_input": True},
    "inception_v4": {},
    "xception": {"pool_padding": "torch", "bn_eps": 1e-3},
}


def checkpoint(path, spec, classes=3, **options):
    """A checkpoint of this repository with closed-form weights."""
    options = {"num_classes": classes, **options}
    state = spec.build(**options).state_dict()
    fill_closed_form(state)
    names = [f"class {i}" for i in range(classes)]
    torch.save({"arch": spec.name, "build": options, "image_size": SIZE, "classes": names, "state_dict": state}, path)


@pytest.mark.parametrize("name", OPTIONS)
def test_timm_opens_the_folder_with_the_same_logits(name, tmp_path):
    spec = models.spec(name)
    checkpoint(tmp_path / "a.pth.tar", spec, **OPTIONS[name])
    hub.write(tmp_path / "a.pth.tar", tmp_path / "folder", spec, ROOT / name / "results.json")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert theirs.pretrained_cfg["label_names"] == ["class 0", "class 1", "class 2"]
    pixels = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    ours_mean, ours_std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    ours, _ = load_model(tmp_path / "a.pth.tar", spec)
    again, meta = load_model(tmp_path / "folder", spec)
    with torch.inference_mode():
        expected = ours((pixels - ours_mean) / ours_std)
        logits, reread = theirs((pixels - mean) / std), again((pixels - ours_mean) / ours_std)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(reread, expected, rtol=0, atol=1e-5 * scale)
    assert meta["image_size"] == SIZE and meta["classes"][2] == "class 2"
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "3 classes, images of 107 x 107 pixels" in card and "library_name: timm" in card
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["architecture"] == spec.timm_name


def test_what_timm_does_not_build_is_refused_and_a_full_folder_is_kept(tmp_path):
    spec = models.spec("xception")
    checkpoint(tmp_path / "a.pth.tar", spec, pool_padding="same")
    with pytest.raises(UserError, match="has pool_padding same, but a file of this format means pool_padding torch"):
        hub.write(tmp_path / "a.pth.tar", tmp_path / "folder", spec, tmp_path / "none")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(UserError, match="not an empty folder"):
        hub.write(tmp_path / "a.pth.tar", tmp_path, spec, tmp_path / "none")


def test_the_model_card_tells_of_the_training():
    config = {"recipe": "finetune", "pretrained": "/secret/place/a.pth", "seed": 3, "epochs": 4, "image_size": 299}
    meta = {"config": config, "classes": ["ants", "bees"], "num_images": 244, "epoch": 4, "step": 0}
    best = {"best_epoch": 4, "best_acc1": 97.3856}
    lines = ["trained on 244 images of 2 classes, 299 pixels", "recipe finetune from a.pth, seed 3, 4 of 4 epochs"]
    assert hub.training_facts({"config": None}) == []
    assert hub.training_facts({**meta, **best}) == [*lines, "best validation top-1: 97.386 %, of these weights"]
    later = {**meta, **best, "best_epoch": 2, "weights": "ema", "config": {**config, "ema": 0.9, "pretrained": ""}}
    assert hub.training_facts(later) == [
        lines[0],
        "recipe finetune from random weights, seed 3, 4 of 4 epochs",
        "best validation top-1: 97.386 %, of the run in epoch 2, not of these weights",
        "averaged weights, decay 0.9",
    ]


def test_a_checkpoint_of_a_run_gives_its_training_to_the_card(weights, tmp_path):
    hub.write(weights, tmp_path / "folder", tiny.SPEC, tmp_path / "none")
    lines = (tmp_path / "folder" / "README.md").read_text().splitlines()
    facts = hub.training_facts(load_model(weights, tiny.SPEC)[1])
    assert {f"* {fact}" for fact in facts} <= set(lines) and "* trained on 60 images of 3 classes, 32 pixels" in lines
    assert facts[2].endswith(", of these weights")


@pytest.mark.parametrize("exists", [False, True])
def test_no_folder_is_left_where_the_logits_differ(tmp_path, monkeypatch, exists):
    spec = models.spec("xception")
    checkpoint(tmp_path / "a.pth.tar", spec, pool_padding="torch")
    (tmp_path / "folder").mkdir() if exists else None
    with monkeypatch.context() as patch:
        patch.setattr("common.weights.convert.TOLERANCE", -1.0)
        with pytest.raises(UserError, match="not written, its logits differ"):
            hub.write(tmp_path / "a.pth.tar", tmp_path / "folder", spec, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.pth.tar"] + ["folder"] * exists
    hub.write(tmp_path / "a.pth.tar", tmp_path / "folder", spec, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "README.md", "a.pth.tar", "config.json", "folder", "model.safetensors",
    ]  # fmt: skip
    mode = (tmp_path / "folder" / "model.safetensors").stat().st_mode & 0o777
    assert mode == (tmp_path / "folder" / "README.md").stat().st_mode & 0o777


def test_timm_resizes_to_the_pixels_of_our_evaluation():
    """Its transform takes floor(side / crop_pct); 117 / (117 / 125) is below 125."""
    transform = timm.data.create_transform((3, 117, 117), crop_pct=hub.crop_pct(117, 125), crop_mode="center")
    assert transform.transforms[0].size == 125
    for spec in map(models.spec, models.names()):
        for side in range(spec.min_size, 700):
            assert math.floor(side / hub.crop_pct(side, spec.resize_for(side))) == spec.resize_for(side)
