"""Programs on the simulated NPU, each in a process of its own: PyTorch's device name cannot be given back."""

import os
import pathlib

import pytest
import torch

HERE = pathlib.Path(__file__).resolve().parent
TORCH_RELEASE = torch.__version__.partition("+")[0]


def site_folder(folder, version=TORCH_RELEASE, packages=("torch_npu",)):
    """Make `folder` an installation of the stand-ins: packages, metadata, the entry point that `import torch` calls."""
    for package in packages:
        (folder / package).symlink_to(HERE / "site" / package)
    if "torch_npu" in packages:
        info = folder / f"torch_npu-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
        (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


def environment(*folders, **more):
    """What puts site folders in front of the installed packages, OpenMP at one thread."""
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """An installation of the simulated torch_npu for the installed torch."""
    return site_folder(tmp_path_factory.mktemp("site"))


@pytest.fixture
def run_npu(run, site, tmp_path):
    """run_npu(*words, check=0, **environment) -> CompletedProcess with `.calls`, the lines of FAKE_NPU_LOG."""

    def start(*words, check=0, **more):
        log = tmp_path / "npu_calls"
        log.unlink(missing_ok=True)
        done = run(*words, check=check, env=environment(site, FAKE_NPU_LOG=str(log), **more))
        done.calls = log.read_text().splitlines() if log.exists() else []
        return done

    return start
