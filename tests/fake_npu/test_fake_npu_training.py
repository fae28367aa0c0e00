"""The trainer with a tiny network on the fake NPU: same bits as the CPU, loss scales, ranks, resume on any device."""

import pytest
import torch
from support import LAUNCH_TINY, TINY, final, run_differences


@pytest.fixture
def train(run_npu, images, tmp_path):
    """train(name, *options) -> (run folder, finished process); --reduce etc. apply, nchw on every device."""

    def start(name, *options, ranks=1, check=0, **environment):
        folder = tmp_path / name
        if ranks == 1:
            words = [TINY, "--data", images, "--output-dir", folder]
        else:
            device = next(o for o in options if o.startswith("--device="))
            keys = [f"--data_path={images}", f"--output_dir={folder}", device, f"--devices={ranks}"]
            words = [*LAUNCH_TINY, *keys, "--"]
        done = run_npu(*words, "--memory-format=nchw", *options, check=check, **environment)
        return folder, done

    return start


def test_fake_npu_loader_processes_averages_and_clipping_equal_the_cpus_bits(train):
    options = ["--epochs=1", "--workers=1", "--accumulate=2", "--ema=0.9", "--clip-grad=1", "--mixup=0.2"]
    npu, done = train("npu", "--device=npu", "--npu=1", *options)
    cpu, _ = train("cpu", "--device=cpu", *options)
    assert run_differences(npu, cpu, across_devices=True) == []
    assert "0 set_device 1" in done.calls and "0 synchronize" in done.calls


def test_fake_npu_two_ranks_on_hccl_equal_two_on_gloo(train):
    """Each rank uses the card of its local rank; NpuFusedSGD and DistributedDataParallel share gradients."""
    npu, done = train("npu", "--device=npu", "--epochs=1", ranks=2)
    cpu, _ = train("cpu", "--device=cpu", "--epochs=1", ranks=2)
    assert run_differences(npu, cpu, across_devices=True) == []
    assert {"0 hccl rank=0 size=2 npu:0", "1 hccl rank=1 size=2 npu:1", "1 NpuFusedSGD"} <= set(done.calls)


def test_fake_npu_exact_reduction_gives_the_same_bits_on_two_cards_as_on_one(train):
    one, done = train("one", "--device=npu", "--epochs=1", "--reduce=exact", "--accumulate=2")
    assert "0 NpuFusedSGD" not in done.calls, "it would miss the gradients that the exact reduction replaces"
    two, _ = train("two", "--device=npu", "--epochs=1", "--reduce=exact", ranks=2)
    assert run_differences(one, two, across_devices=True) == []


def test_fake_npu_a_run_moves_between_devices_in_mid_epoch(train):
    options = ["--epochs=1", "--ema=0.9"]
    whole, _ = train("whole", "--device=cpu", *options)
    train("moved", "--device=cpu", *options, "--max-steps=1")
    train("moved", "--device=npu", *options, "--resume=auto", "--max-steps=3")
    moved, _ = train("moved", "--device=cpu", *options, "--resume=auto")
    assert run_differences(whole, moved, across_devices=True) == []


def test_fake_npu_batch_size_and_learning_rate_are_found_on_the_card(train):
    """28.8 GiB are nine tenths of a card; a step of the size found is the last one of the trial."""
    options = ["--batch-size=auto", "--lr-find", "--epochs=1", "--max-steps=2"]
    folder, done = train("found", "--device=npu", *options)
    assert "--batch-size auto: 6 images per device and micro-batch; " in done.stdout
    assert "fit in 28.8 GiB of npu:0" in done.stdout and "0 reset_peak_memory_stats" in done.calls
    assert final(folder)["found"]["batch_size"] == 6 and "--lr-find: 0" in done.stdout


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def test_fake_npu_a_dynamic_loss_scale_falls_with_each_overflow_and_is_resumed(train):
    options = ["--device=npu", "--amp", "--loss-scale=dynamic", "--lr=10"]
    folder, done = train("run", *options, "--epochs=1")
    assert "0 GradScaler init_scale=65536 dynamic=True" in done.calls
    state = final(folder)
    skipped = done.calls.count("0 skipped step")
    assert state["amp_type"] == "fp16" and state["scaler"]["scale"] == 2.0 ** (16 - skipped)
    assert all(t.device.type == "cpu" for t in tensors(state))
    assert 0 < skipped < 5
    folder, done = train("run", *options, "--epochs=2", "--resume=auto")
    assert final(folder)["scaler"]["scale"] == state["scaler"]["scale"] / 2 ** done.calls.count("0 skipped step")


def test_fake_npu_a_static_loss_scale_stays_and_its_overflowing_steps_are_skipped(train):
    options = ["--device=npu", "--amp", "--max-steps=2", "--epochs=1", "--dropout=0", "--no-decay-norm"]
    good, done = train("good", *options, "--loss-scale=1024")
    assert "0 skipped step" not in done.calls and final(good)["scaler"]["scale"] == 1024
    bad, done = train("bad", *options, "--loss-scale=1e30")
    assert done.calls.count("0 skipped step") == 2 and final(bad)["scaler"]["scale"] == pytest.approx(1e30)
    assert final(bad)["optimizer"]["state"] == {} and final(good)["optimizer"]["state"] != {}


def test_fake_npu_a_step_in_fp16_stays_close_to_full_precision(train):
    options = ["--device=npu", "--max-steps=1", "--epochs=1", "--dropout=0"]
    exact, done = train("exact", *options, "--full-fp32")
    assert {"0 conv.allow_hf32 False", "0 matmul.allow_hf32 False"} <= set(done.calls)
    weights = final(exact)["state_dict"]
    half, _ = train("half", *options, "--amp", "--loss-scale=1024")
    for name, value in final(half)["state_dict"].items():
        assert torch.allclose(value.double(), weights[name].double(), atol=2e-3), name


def test_fake_npu_without_bf16_evaluates_what_bf16_trained_in_full_precision(train, run_npu, images):
    folder, _ = train("run", "--device=cpu", "--amp", "--amp-dtype=bf16", "--epochs=4")
    words = [TINY, "--data", images, "--evaluate", "--resume", folder / "checkpoint.pth.tar", "--device"]
    old, new = (run_npu(*words, "npu", FAKE_NPU_CHIP=chip) for chip in ("Ascend910A", "Ascend910B3"))
    lines = [done.stdout.splitlines()[-1] for done in (old, new)]
    assert "Acc@1" in lines[0] and lines[0] != lines[1], "the losses of float32 and of bf16"
    assert "autocast" not in old.stderr
