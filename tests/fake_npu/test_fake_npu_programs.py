"""The real programs, unchanged, on the fake NPU."""

import json

import pytest
import torch
from support import ROOT, fill_closed_form, final, npu_environment, run_differences, user_error

from inception_v3.spec import SPEC

V3, XCEPTION = ROOT / "inception_v3", ROOT / "xception"
SMALL = ["--image-size=75", "--threads=1", "--print-freq=1", "--eval-batch-size=8"]


@pytest.fixture(scope="module")
def few(images, tmp_path_factory):
    """Dataset root of 3 classes with 24 training and 3 validation images."""
    root = tmp_path_factory.mktemp("few")
    for part, per_class in (("train", 8), ("val", 1)):
        for folder in (images / part).iterdir():
            (root / part / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:per_class]:
                (root / part / folder.name / file.name).symlink_to(file)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights with which activations keep their size, so that fp16 has a chance after a step or two."""
    state = SPEC.build(num_classes=3).state_dict()
    fill_closed_form(state)
    path = tmp_path_factory.mktemp("weights") / "closed_form.pth"
    torch.save(state, path)
    return path


def trained(run_program, few, weights, folder, *options):
    return run_program(
        V3 / "train.py",
        "--data",
        few,
        "--output-dir",
        folder,
        "-b",
        8,
        "-j",
        1,
        "--epochs=1",
        "--lr=0.001",
        "--pretrained",
        weights,
        *SMALL,
        *options,
    )


@pytest.fixture
def run_dir(site, few, weights, tmp_path_factory, run_npu, request):
    """Run folder of three steps of train.py on npu:1, made once, with what it printed and called."""
    cache = request.config.stash.setdefault(_TRAINED, {})
    if not cache:
        folder = tmp_path_factory.mktemp("npu") / "run"
        cache["done"] = trained(run_npu, few, weights, folder, "--npu", 1)
        cache["folder"] = folder
    return cache["folder"], cache["done"]


_TRAINED = pytest.StashKey()


def test_fake_npu_three_steps_of_training_equal_the_cpus_bits(run_dir, run_npu, few, weights, tmp_path):
    folder, done = run_dir
    trained(run_npu, few, weights, tmp_path / "cpu", "--device=cpu", "--memory-format=nchw")
    assert final(folder)["step"] == 0 and final(folder)["epoch"] == 1 and "3 steps of 8 images" in done.stdout
    assert run_differences(folder, tmp_path / "cpu", across_devices=True) == []
    assert {"0 set_device 1", "0 NpuFusedSGD", "0 synchronize"} <= set(done.calls)
    assert "on npu:1 (Ascend910B3), nchw" in done.stdout


def test_fake_npu_evaluates_names_and_exports_what_it_trained(run_dir, run_npu, few, tmp_path):
    folder, done = run_dir
    best = folder / "model_best.pth.tar"
    printed = next(line for line in done.stdout.splitlines() if "Acc@1" in line)
    evaluated = run_npu(
        V3 / "eval.py", "--data", few, "--resume", best, "--device=npu", "--device-id=1", "-j", 0, "--full-fp32"
    )
    assert "3 images" in evaluated.stdout
    assert {"0 set_device 1", "0 conv.allow_hf32 False"} <= set(evaluated.calls)
    line = next(line for line in evaluated.stdout.splitlines() if line.startswith("* Acc@1") or "Acc@1" in line)
    assert line.split("loss")[0].strip() in printed
    named = run_npu(V3 / "demo.py", few / "val" / "ant", "--resume", best, "--device=npu").stdout.splitlines()
    assert len(named) == 4 and {line.split()[-1] for line in named[1:]} == {"ant", "bee", "cat"}
    exported = run_npu(V3 / "pthtar2onnx.py", "--ckpt", best, "--onnx", tmp_path / "v3.onnx")
    assert (tmp_path / "v3.onnx").exists() and "v3.onnx" in exported.stdout and exported.calls == []


def test_fake_npu_one_device_launcher_trains_in_fp16_and_resumes(run_npu, few, weights, tmp_path):
    words = [
        V3 / "test" / "train_full_1p.sh",
        f"--data_path={few}",
        "--device=npu",
        "--batch_size=8",
        "--epochs=1",
        f"--output_dir={tmp_path / 'run'}",
        "--lr=0.001",
    ]
    first = run_npu(*words, "--", *SMALL, "-j", 0, "--max-steps=1", f"--pretrained={weights}")
    assert "amp fp16" in first.stdout and "0 GradScaler init_scale=1024 dynamic=True" in first.calls
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["amp"] == "fp16"
    assert final(tmp_path / "run")["scaler"]["scale"] == 1024
    second = run_npu(*words, "--resume=auto", "--", *SMALL, "-j", 0, "--max-steps=2", "--loss-scale=dynamic")
    assert "resumed at epoch 1 step 1" in second.stdout
    assert second.stdout.splitlines()[-4] == "------------------ Final result ------------------"
    assert final(tmp_path / "run")["step"] == 2


def test_fake_npu_eight_device_launcher_on_two(run_npu, few, weights, tmp_path):
    done = run_npu(
        V3 / "test" / "train_full_8p.sh",
        f"--data_path={few}",
        "--device=npu",
        "--devices=2",
        "--batch_size=8",
        "--epochs=1",
        f"--output_dir={tmp_path / 'run'}",
        "--lr=0.001",
        "--",
        *SMALL,
        "-j",
        0,
        "--max-steps=1",
        "--loss-scale=8",
        f"--pretrained={weights}",
    )
    assert "2 rank(s) on npu:0" in done.stdout and "(3 images)" in done.stdout
    assert {"0 hccl rank=0 size=2 npu:0", "1 hccl rank=1 size=2 npu:1", "1 NpuFusedSGD"} <= set(done.calls)
    assert done.stdout.splitlines()[-4] == "------------------ Final result ------------------"


def test_fake_npu_xceptions_launcher_on_two(run, site, few, tmp_path):
    log = tmp_path / "calls"
    done = run(
        "sh",
        XCEPTION / "scripts" / "run_distribute_train.sh",
        "no_table.json",
        few / "train",
        "--devices=2",
        "--",
        "--image-size=71",
        "--threads=1",
        "--workers=0",
        "--batch_size=6",
        "--epoch_size=1",
        "--lr_max=0.01",
        "--max-steps=1",
        "--print-freq=1",
        env=npu_environment(site, FAKE_NPU_LOG=str(log)),
    )
    assert "2 rank(s) on npu:0 (Ascend910B3), nchw, amp fp16" in done.stdout
    assert "epoch: 1 step: 1, loss is " in done.stdout
    assert (tmp_path / "log.txt").exists()
    expected = {"0 hccl rank=0 size=2 npu:0", "1 hccl rank=1 size=2 npu:1", "1 GradScaler init_scale=1024 dynamic=True"}
    assert expected <= set(log.read_text().splitlines())


def test_fake_npu_evaluation_compiled_by_torchair_counts_the_same(run_npu, few, weights):
    words = [V3 / "eval.py", "--data", few, "--resume", weights, "--device=npu", "--threads=1", "-j1", "-b2"]
    plain = run_npu(*words, "--image-size=75")
    compiled = run_npu(*words, "--image-size=75", "--compile")
    assert "3 images" in plain.stdout and plain.stdout.splitlines()[1:] == compiled.stdout.splitlines()[1:]
    assert not any("torchair" in call for call in plain.calls)
    # One graph, of two images: the last batch, of one, is filled up.
    (graph,) = [call for call in compiled.calls if "torchair" in call]
    assert "(2, 3, 75, 75)" in graph


@pytest.mark.parametrize(
    ("environment", "status", "message"),
    [
        (
            {"FAKE_NPU_CHIP": "Ascend310P3"},
            2,
            "torchair, the compiler of torch_npu, is for Atlas A2, A3 and 950, not Asc",
        ),
        ({"FAKE_NPU_TORCHAIR": "absent"}, 2, "the compiler of torch_npu is missing (No module named 'torchair')"),
        ({"FAKE_NPU_TORCHAIR": "broken"}, 2, "torchair does not start (ImportError: libgraph.so: cannot open"),
        ({"FAKE_NPU_TORCHAIR": "refuses"}, 1, "EZ9999: no such kernel (torchair)"),
    ],
)
def test_fake_npu_evaluation_that_cannot_be_compiled_ends_with_one_line(
    run_npu, few, weights, environment, status, message
):
    words = [V3 / "eval.py", "--data", few, "--resume", weights, "--device=npu", "--threads=1", "-j1", "-b2"]
    done = run_npu(*words, "--image-size=75", "--compile", check=status, **environment)
    error = user_error(done)
    assert error.startswith(f"--compile: {message}") and error.endswith("; leave it out")
