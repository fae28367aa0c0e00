"""Programs on the fake NPU, each in its own process: a device registered with PyTorch cannot be removed."""

import pytest
from support import npu_environment, npu_site


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """Site folder with the fake torch_npu of the installed torch's version."""
    return npu_site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def run_npu(run, site, tmp_path):
    """run_npu(*words, check=0, **environment) -> CompletedProcess with `.calls`, the lines of FAKE_NPU_LOG."""

    def start(*words, check=0, **more):
        log = tmp_path / "npu_calls"
        log.unlink(missing_ok=True)
        done = run(*words, check=check, env=npu_environment(site, FAKE_NPU_LOG=str(log), **more))
        done.calls = log.read_text().splitlines() if log.exists() else []
        return done

    return start
