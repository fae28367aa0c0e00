"""The fake NPU rejects what a card rejects; a missing NPU is an error with its reason and a remedy."""

import dataclasses
import json
import sys

import pytest
from support import ROOT, TINY, npu_environment, npu_site, user_error

from common.config import TrainConfig
from common.device import diagnosis
from common.device.device import Device
from common.errors import UserError

HERE = ROOT / "tests" / "fake_npu"


def test_fake_npu_refuses_what_a_card_refuses(run_npu):
    answers = json.loads(run_npu(HERE / "refusals.py").stdout)
    allowed = {"a number of the host", "a copy from the host", "saving a host copy", "the host in a fork"}
    assert {name for name, answer in answers.items() if answer == "done"} == allowed
    assert "found at least two devices, cpu and npu:1" in answers["operands on two devices"]
    assert "found at least two devices, npu:0 and npu:1" in answers["operands on two cards"]
    assert "DT_DOUBLE" in answers["float64"] and "DT_DOUBLE" in answers["a float64 constant"]
    assert "private format" in answers["saving"]
    assert "a gradient left the joined buffer" in answers["a replaced gradient"]
    assert answers["the device in a fork"].startswith("RuntimeError: Cannot re-initialize NPU in forked subprocess")


REASONS = {
    "cann": ("CANN's libhccl.so is not found", "set_env.sh"),
    "driver": ("the Ascend driver's libascend_hal.so is not found", "mount"),
    "symbol": ("undefined symbol", "torch 2.12.0 with torch_npu 2.12.0 and CANN 9.1"),
    "opp": ("CANN's ASCEND_OPP_PATH is not set", "set_env.sh"),
    "cuda": ("is a build for CUDA, torch_npu needs PyTorch's CPU build", "requirements-npu.txt"),
}


def test_fake_npu_each_failure_to_load_is_named_with_its_remedy(run_npu):
    answers = json.loads(run_npu(HERE / "detection.py", *REASONS).stdout)
    for fault, (reason, remedy) in REASONS.items():
        asked, auto, cpu = answers[fault]
        assert asked.startswith("--device: npu is not available: ") and reason in asked and remedy in asked, fault
        assert asked.endswith("; --device cpu runs without it") and "\n" not in asked
        assert auto.startswith("--device: npu (found by auto) is not available") and reason in auto, fault
        assert cpu == "cpu"


def test_fake_npu_without_cann_programs_say_so_and_go_on_with_the_cpu(run_npu, images, tmp_path):
    plain = run_npu(sys.executable, "-c", "import torch", check=1, FAKE_NPU_FAULT="cann").stderr
    assert "Failed to load the backend extension: torch_npu" in plain, "what PyTorch itself does with it"
    words = [TINY, "--data", images, "--epochs=1", "--max-steps=1"]
    error = user_error(run_npu(*words, "--device=npu", check=2, FAKE_NPU_FAULT="cann"))
    assert "CANN's libhccl.so is not found" in error and "--device cpu runs without it" in error
    assert "Final Train Accuracy" in run_npu(*words, "--device=cpu", FAKE_NPU_FAULT="cann").stdout


def test_fake_npu_of_another_torch_release_is_refused_with_the_pairs_that_fit(run, tmp_path, images):
    (tmp_path / "site").mkdir()
    site = npu_site(tmp_path / "site", version="2.9.0.post2")
    done = run(TINY, "--data", images, "--device=npu", check=2, env=npu_environment(site))
    error = user_error(done)
    assert "torch_npu 2.9.0.post2 needs torch 2.9.0, but this is torch" in error
    assert "torch 2.12.0 with torch_npu 2.12.0 and CANN 9.1" in error


def test_fake_npu_a_number_beyond_the_cards_is_named(run_npu, images):
    error = user_error(run_npu(TINY, "--data", images, "--npu=2", "--device=auto", check=2))
    assert error == "--device: npu:2 does not exist, this machine has 2"


@pytest.mark.parametrize(
    ("files", "visible", "reason"),
    [
        ((), None, "no Ascend driver is loaded"),
        (("davinci_manager",), None, "the Ascend driver is loaded but finds no card"),
        (("davinci_manager", "davinci0", "davinci1"), None, "finds none of the cards davinci0, davinci1"),
        (("davinci_manager", "davinci0"), "0, 1", "ASCEND_RT_VISIBLE_DEVICES is '0, 1'"),
        ((".dockerenv",), None, "this container has no "),
    ],
)
def test_fake_npu_no_card_has_a_reason(tmp_path, monkeypatch, files, visible, reason):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    assert reason in diagnosis.why_no_card(dev=tmp_path, root=tmp_path)


def test_fake_npu_without_a_card_is_an_error_and_not_the_cpu(run_npu, images):
    error = user_error(run_npu(TINY, "--data", images, "--device=auto", check=2, FAKE_NPU_CARDS="0"))
    assert error.startswith("--device: npu (found by auto) is not available: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True}, "--compile: torch.compile is not supported on npu for training: torchair"),
        ({"memory_format": "channels_last"}, "--memory-format: channels_last is not supported on npu; use nchw"),
    ],
)
def test_fake_npu_options_that_it_lacks_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Device("npu").check(dataclasses.replace(TrainConfig(), **options))


def test_fake_npu_a_chip_without_bf16_says_so_before_a_folder_exists(run_npu, images, tmp_path):
    words = [TINY, "--data", images, "--device=npu", "--amp", "--amp-dtype=bf16"]
    error = user_error(run_npu(*words, check=2, FAKE_NPU_CHIP="Ascend910A"))
    assert error == "--amp-dtype: bf16 is not supported by this chip (npu:0 (Ascend910A)); use fp16"
    assert not (tmp_path / "output").exists()
