"""The launchers on real photographs, where ../shared/data has them."""

import re

import pytest
from support import ROOT

V3 = ROOT / "inception_v3"


@pytest.mark.realdata
@pytest.mark.parametrize(("launcher", "devices"), [("train_full_1p", 1), ("train_full_8p", 2)])
def test_training_ends_with_the_final_lines_and_eval_repeats_its_accuracy(run, tmp_path, ants_bees, launcher, devices):
    done = run(
        V3 / "test" / f"{launcher}.sh",
        f"--data_path={ants_bees}",
        "--device=cpu",
        f"--devices={devices}",
        "--batch_size=16",
        "--epochs=1",
        "--lr=0.001",
        "--",
        "-p",
        2,
        "--image-size",
        96,
        "--max-steps=4",
    )
    lines = done.stdout.splitlines()
    assert "83 images (1 other files ignored) in 2 classes, 52 for validation" in lines[0]
    printed = re.search(r"\* Acc@1 (\S+) loss \S+ \(52 images\)", done.stdout).group(1)
    assert lines[-4] == "------------------ Final result ------------------"
    assert lines[-2] == f"Final Train Accuracy : {printed}"
    best = tmp_path / "output" / launcher / "00000" / "model_best.pth.tar"
    again = run(V3 / "eval.py", "--data", ants_bees, "--resume", best, "--device=cpu").stdout
    assert re.search(r"\* Acc@1 (\S+) .*\(52 images\)", again).group(1) == printed
