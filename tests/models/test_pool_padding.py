"""--pool-padding: chosen for a training from scratch, kept by its checkpoints, and said beforehand where it leads to."""

import pytest
import torch

from common.errors import UserError
from common.train import run_setup
from common.weights.convert import convert, destinations
from common.weights.load import load_model
from tools import models

V3, V4, XCEPTION = (models.spec(name) for name in ("inception_v3", "inception_v4", "xception"))
TORCH = "timm and other PyTorch programs (.pth, .safetensors, --to hub)"
MINDSPORE, KERAS = "MindSpore (.ckpt)", "Keras (.h5, .keras)"


def line(pool_padding, side):
    return f"weights with pool_padding {pool_padding} at {side} x {side} pixels can be converted for "


@pytest.mark.parametrize("spec", [V3, XCEPTION], ids=lambda spec: spec.name)
def test_the_line_names_what_each_pooling_leads_to(spec):
    build = spec.build_options
    assert destinations(spec, {**build, "pool_padding": "same"}, 299) == (
        f"{line('same', 299)}{MINDSPORE} and {KERAS}; not for {TORCH}, which have pool_padding torch"
    )
    assert destinations(spec, {**build, "pool_padding": "torch"}, 299) == (
        f"{line('torch', 299)}{TORCH}; not for {MINDSPORE} and {KERAS}, which have pool_padding same"
    )


def test_at_295_pixels_xception_leads_everywhere_and_inception_v4_has_no_choice():
    for phase in ("same", "torch"):
        build = {**XCEPTION.build_options, "pool_padding": phase}
        assert destinations(XCEPTION, build, 295) == f"{line(phase, 295)}{TORCH} and {MINDSPORE} and {KERAS}"
    assert destinations(V4, V4.build_options, 299) == ""


def test_a_run_keeps_it_and_its_weights_leave_for_keras(images, tmp_path, capsys):
    program = models.program("inception_v3")
    words = ["--data", str(images), "--image-size=107", "--workers=0", "--threads=1", "--device=cpu", "--batch-size=2"]
    words += ["--max-steps=1", "--lr=1e-4"]
    program.main([*words, "--pool-padding=same", "--output-dir", str(tmp_path / "run"), "--eval-size=111"])
    out = capsys.readouterr().out
    assert f"{line('same', 111)}{MINDSPORE} and {KERAS}; not for {TORCH}" in out
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    network, meta = load_model(checkpoint, V3)
    assert meta["build"]["pool_padding"] == "same"
    assert convert(checkpoint, tmp_path / "a.h5", V3).difference <= 1e-5
    resumed = [*words, f"--resume={checkpoint}", "--max-steps=2", "--eval-size=111"]
    with pytest.raises(UserError, match="--pool-padding: torch, but the checkpoint .* has same"):
        program.prepare(*program.parse([*resumed, "--pool-padding=torch"]))
    assert program.prepare(*program.parse(resumed)).build_options["pool_padding"] == "same"
    # A checkpoint from before the option has the network's own pooling.
    content = torch.load(checkpoint)
    del content["build"]["pool_padding"]
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match="--pool-padding: same, but the checkpoint .* has torch"):
        program.prepare(*program.parse([*resumed, "--pool-padding=same"]))


def test_weights_of_another_pooling_are_taken_with_a_note(images, tmp_path):
    program = models.program("xception")
    torch.save(XCEPTION.build(num_classes=3).state_dict(), tmp_path / "timm.pth")
    words = ["--dataset_path", str(images / "train"), "--image-size=71", "--batch_size=4", "--num_classes=3"]
    words += [f"--pretrained={tmp_path}/timm.pth", "--device=cpu"]
    setup = program.prepare(*program.parse([*words, "--pool-padding=same"]))
    note = f"note: --pool-padding same: {tmp_path}/timm.pth holds weights of a network with torch, whose logits differ"
    assert setup.build_options["pool_padding"] == "same" and note in setup.notes
    setup = program.prepare(*program.parse(words))
    assert setup.build_options["pool_padding"] == "torch" and not any("pool" in each for each in setup.notes)
    assert any(f"converted for {TORCH}" in each for each in run_setup.notes(setup))


def test_a_network_without_pools_that_differ_has_no_such_option(images):
    program = models.program("inception_v4")
    with pytest.raises(UserError, match="--pool-padding: inception_v4 has no such option"):
        program.prepare(*program.parse(["--data", str(images), "--pool-padding=same"]))
