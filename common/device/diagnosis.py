"""Why a device cannot be used here, in one line that says what to do. A part of common/device.py."""

import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import re

import torch

# torch_npu works with one release of torch; newest first, from its COMPATIBILITY table.
_RELEASES = (  # torch, torch_npu, CANN
    ("2.12.0", "2.12.0", "9.1.0"),
    ("2.11.0", "2.11.0", "9.1.0"),
)
_DRIVER_LIBRARIES = ("libascend_hal.so", "libdrvdsmi_host.so", "libdcmi.so")
_SET_ENV = (
    "/usr/local/Ascend/cann/set_env.sh",
    "/usr/local/Ascend/ascend-toolkit/set_env.sh",
    "/usr/local/Ascend/nnae/set_env.sh",
    "~/Ascend/cann/set_env.sh",
    "~/Ascend/ascend-toolkit/set_env.sh",
)


def is_installed(kind):
    """Whether the package that a kind of device needs beside torch is there."""
    return kind != "npu" or importlib.util.find_spec("torch_npu") is not None


def why_missing(kind):
    """Why a kind of device ("npu" or "cuda") cannot be used, or None when it can."""
    if kind == "cuda":
        if torch.version.cuda is None:
            return "this torch is a CPU build"
        return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU or driver"
    if not is_installed("npu"):
        return "torch_npu is not installed (requirements-npu.txt)"
    mismatch = _why_not_a_pair(_version_of("torch_npu"), torch.__version__)
    if mismatch:
        return mismatch
    try:
        import torch_npu  # noqa: F401  registers the npu device
    except Exception as error:  # noqa: BLE001  half an installation of CANN makes it raise the bare Exception
        return why_import_failed(error)
    return None if torch.npu.is_available() else why_no_card()


def _version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on PYTHONPATH without being installed
        return None


def _why_not_a_pair(torch_npu_version, torch_version):
    """Why these releases do not work together, with those that do; None where they do."""
    release = re.compile(r"\d+\.\d+\.\d+")
    theirs, ours = (release.match(version or "") for version in (torch_npu_version, torch_version))
    if not theirs or not ours or theirs[0] == ours[0]:
        return None
    pairs = ", ".join(f"torch {torch} with torch_npu {npu} and CANN {cann}" for torch, npu, cann in _RELEASES)
    return (
        f"torch_npu {torch_npu_version} is made for torch {theirs[0]}, but this is torch {torch_version}; what fits: "
        f"{pairs} (`pip install -r requirements-npu.txt` installs the first)"
    )


def why_import_failed(error):
    """The reason behind an exception of `import torch_npu`."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    if "Two accelerators" in text:
        return (
            f"torch {torch.__version__} is a build for CUDA, torch_npu needs PyTorch's CPU build: "
            "`pip install -r requirements-npu.txt` in an environment of its own"
        )
    library = re.match(r"(lib[\w.+-]*\.so[\w.]*): cannot open shared object file", text)
    if library and library[1] in _DRIVER_LIBRARIES:
        return (
            f"torch_npu does not load: the Ascend driver's {library[1]} is not found; install the driver, or mount "
            "/usr/local/Ascend/driver into the container and source its lib64 through CANN's set_env.sh"
        )
    if library:
        return f"torch_npu does not load: CANN's {library[1]} is not found; {_how_to_get_cann()}"
    if "undefined symbol" in text:
        pairs = ", ".join(f"torch_npu {npu} with CANN {cann}" for _, npu, cann in _RELEASES)
        return (
            f"torch_npu does not load ({first}): it was made for another torch or CANN; what fits: {pairs}; then "
            "`pip install -r requirements-npu.txt`"
        )
    if "set_env.sh" in text:
        variable = re.match(r"\w+", text)[0]
        return f"torch_npu does not load: CANN's {variable} is not set; {_how_to_get_cann()}"
    return f"torch_npu does not load ({first}); {_how_to_get_cann()}"


def _how_to_get_cann():
    """What to type to have CANN's libraries."""
    found = [path for pattern in _SET_ENV for path in glob.glob(os.path.expanduser(pattern))]
    if found:
        return f"run `source {found[0]}` first"
    return f"source CANN's set_env.sh first (usually {_SET_ENV[0]}, before CANN 8.5 {_SET_ENV[1]})"


def why_no_card(dev="/dev", root="/"):
    """Why torch_npu, which loaded, sees no card.

    Args:
      dev: folder of the device files.
      root: folder that shows whether this is a container.
    """
    dev, root = pathlib.Path(dev), pathlib.Path(root)
    cards = sorted(path.name for path in dev.glob("davinci[0-9]*"))
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if cards and visible is not None:
        return (
            f"torch_npu sees none of the {len(cards)} cards: ASCEND_RT_VISIBLE_DEVICES is {visible!r} (it takes "
            "ascending numbers with commas and no spaces)"
        )
    if cards:
        return (
            f"torch_npu sees none of the cards {', '.join(cards)} in {dev}; `npu-smi info` shows their health, and the "
            "user must be in the group that owns these files (`ls -l`)"
        )
    if (root / ".dockerenv").exists() or (root / "run" / ".containerenv").exists():
        return (
            f"this container has no {dev}/davinci*; start it with --device=/dev/davinci0 (one for each card) "
            "--device=/dev/davinci_manager --device=/dev/devmm_svm --device=/dev/hisi_hdc "
            "-v /usr/local/Ascend/driver:/usr/local/Ascend/driver"
        )
    if (dev / "davinci_manager").exists():
        return "the Ascend driver is loaded but found no card; `npu-smi info` and `dmesg` say why"
    return f"torch_npu sees no NPU: no Ascend driver is loaded ({dev}/davinci_manager is not there)"
