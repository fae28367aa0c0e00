"""The stand-ins as pip would have installed them: what a subprocess needs to find them."""

import os
import pathlib

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
    # importing common has told this process not to load backends with torch; a user's shell says nothing
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1", **more}
