"""Programs on the simulated NPU, each in a process of its own: PyTorch's device name cannot be given back."""

import pytest
from support import npu_environment, npu_site


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """An installation of the simulated torch_npu for the installed torch."""
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
