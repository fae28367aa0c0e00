"""--amp-backend apex with a fake apex: the sequence of calls, and the messages if apex is missing or another."""

import pytest
import torch
from support import LAUNCH_TINY, TINY, final, npu_environment, npu_site, user_error

APEX = ["--amp", "--amp-backend=apex", "--epochs=1", "--lr=0.01"]


@pytest.fixture(scope="session")
def apex_site(tmp_path_factory):
    return npu_site(tmp_path_factory.mktemp("apex_site"), packages=("torch_npu", "apex"))


@pytest.fixture
def train(run, apex_site, images, tmp_path):
    """train(*options, check=0) -> (run folder, apex's calls, finished process)."""

    def start(*options, check=0, ranks=1, **more):
        folder, log = tmp_path / "run", tmp_path / "calls"
        log.unlink(missing_ok=True)
        words = [TINY, "--data", images, "--output-dir", folder, "--device=npu"]
        if ranks > 1:
            words = [
                *LAUNCH_TINY,
                f"--data_path={images}",
                "--device=npu",
                f"--output_dir={folder}",
                f"--devices={ranks}",
                "--",
            ]
        done = run(*words, *options, check=check, env=npu_environment(apex_site, FAKE_NPU_LOG=str(log), **more))
        lines = log.read_text().splitlines() if log.exists() else []
        return folder, [line.removeprefix("0 apex.") for line in lines if line.startswith("0 apex.")], done

    return start


def test_fake_npu_apex_o2_is_called_in_its_order_and_resumed(train):
    options = [*APEX, "--loss-scale=128", "--combine-grad", "--accumulate=2", "--clip-grad=5"]
    folder, calls, _ = train(*options, "--max-steps=2")
    step = ["scale_loss delay_unscale=True", "scale_loss delay_unscale=False", "step"]
    assert calls == ["initialize O2 loss_scale=128.0 combine_grad=True", *step, *step, "state_dict", "state_dict"]
    state = final(folder)
    assert state["scaler"] == {"loss_scaler0": {"loss_scale": 128.0, "unskipped": 0}}
    assert {v.dtype for v in state["state_dict"].values()} == {torch.float32, torch.int64}
    assert all(torch.isfinite(v).all() for v in state["state_dict"].values())
    folder, calls, _ = train(*options, "--resume=auto", "--max-steps=3")
    assert calls[:2] == ["initialize O2 loss_scale=128.0 combine_grad=True", "load_state_dict 128.0"]
    assert calls[2:5] == step and final(folder)["step"] == 3


def test_fake_npu_apex_o2_steps_like_full_precision(train, tmp_path):
    folder, calls, _ = train(*APEX, "--opt-level=O2", "--loss-scale=8", "--max-steps=1", "--dropout=0")
    mixed = final(folder)["state_dict"]
    folder.rename(tmp_path / "mixed")
    folder, _, _ = train("--epochs=1", "--lr=0.01", "--max-steps=1", "--dropout=0")
    for name, value in final(folder)["state_dict"].items():
        assert torch.allclose(value.double(), mixed[name].double(), atol=2e-3), name


def test_fake_npu_apex_o1_on_two_cards_with_a_dynamic_scale(train):
    folder, calls, done = train(*APEX, "--opt-level=O1", ranks=2)
    assert calls[0] == "initialize O1 loss_scale=dynamic combine_grad=False"
    skipped = calls.count("skipped")
    assert final(folder)["scaler"]["loss_scaler0"]["loss_scale"] == 2.0 ** (16 - skipped)
    assert calls.count("step") + skipped == 5 and calls.count("step") > 0
    assert "Final Train Accuracy" in done.stdout


def unrelated_apex(folder):
    """PyPI's package of that name, as pip installs it."""
    (folder / "apex").mkdir()
    (folder / "apex" / "__init__.py").write_text("from pyramid.config import Configurator\n")
    info = folder / "apex-0.9.10.dev0.dist-info"
    info.mkdir()
    summary = "Pyramid toolkit to add Velruse, Flash Messages, CSRF, ReCaptcha and Sessions"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nSummary: {summary}\n")
    return folder


def test_fake_npu_what_is_not_apex_is_recognized(run, site, images, tmp_path):
    words = [TINY, "--data", images, "--device=npu", *APEX]
    error = user_error(run(*words, check=2, env=npu_environment(site)))
    assert error.startswith("--amp-backend: apex is not installed; install Ascend's") and "native" in error
    (tmp_path / "site").mkdir()
    error = user_error(run(*words, check=2, env=npu_environment(site, unrelated_apex(tmp_path / "site"))))
    assert "apex 0.9.10.dev0 (Pyramid toolkit to add Velruse" in error and "pip uninstall apex" in error
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--combine-grad"], "--combine-grad: this apex has no combine_grad (Ascend's has)"),
        (["--device=cpu"], "--amp-backend: apex is for npu and cuda; leave it out on cpu"),
    ],
)
def test_fake_npu_apex_refuses_what_it_cannot_do(train, options, message):
    _, _, done = train(*APEX, *options, check=2, FAKE_APEX="nvidia")
    assert message in user_error(done)
