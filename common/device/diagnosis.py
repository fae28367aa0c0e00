"""Why a kind of device cannot be used on this machine: one line with what was found and what to do."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re

from common.device import cann, versions

_DRIVER_LIBRARIES = ("libascend_hal.so", "libdrvdsmi_host.so", "libdcmi.so")


def is_installed(kind: str) -> bool:
    """Whether the package that a kind of device needs besides torch is installed."""
    return kind != "npu" or importlib.util.find_spec("torch_npu") is not None


def why_missing(kind: str) -> str | None:
    """Why "npu" or "cuda" cannot be used, or None if it can."""
    import torch

    if kind == "cuda":
        if torch.version.cuda is None:
            return "this torch is a CPU build"
        return None if torch.cuda.is_available() else "torch finds no NVIDIA GPU or driver"
    if not is_installed("npu"):
        return "torch_npu is not installed (requirements-npu.txt)"
    mismatch = release_mismatch(_version_of("torch_npu"), torch.__version__)
    if mismatch:
        return mismatch
    try:
        import torch_npu  # noqa: F401  registers the npu device
    except Exception as error:  # noqa: BLE001  with an incomplete CANN it raises a bare Exception
        return why_import_failed(error)
    return None if torch.get_device_module("npu").is_available() else why_no_card()


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # on PYTHONPATH without being installed
        return None


def release_mismatch(torch_npu_version: str | None, torch_version: str) -> str | None:
    """Why these releases do not work together, with those that do; None if they do."""
    release = re.compile(r"\d+\.\d+\.\d+")
    required, installed = release.match(torch_npu_version or ""), release.match(torch_version)
    if not required or not installed or required[0] == installed[0]:
        return None
    return (
        f"torch_npu {torch_npu_version} needs torch {required[0]}, but this is torch {torch_version}; supported: "
        f"{_supported()} (`pip install -r requirements-npu.txt` installs the first)"
    )


def cann_mismatch(cann_version: str | None) -> str | None:
    """What to do where the installed torch_npu does not go with this CANN; None if it does, or if that is unknown."""
    npu, series = versions.torch_npu(_version_of("torch_npu")), versions.cann(cann_version)
    if npu is None or series is None or series.cann in npu.works_with:
        return None
    return (
        f"torch_npu {npu.version} was built for CANN {npu.cann} and works with {', '.join(npu.works_with)}; install "
        f"one of these ({_supported()})"
    )


def _supported() -> str:
    return versions.describe(versions.supported())


def why_import_failed(error: Exception) -> str:
    """The reason behind an exception of `import torch_npu`."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    if "Two accelerators" in text:
        import torch

        return (
            f"torch {torch.__version__} is a build for CUDA, torch_npu needs PyTorch's CPU build: "
            "`pip install -r requirements-npu.txt` in an environment of its own"
        )
    library = re.match(r"(lib[\w.+-]*\.so[\w.]*): cannot open shared object file", text)
    if library and library[1] in _DRIVER_LIBRARIES:
        return f"torch_npu cannot be imported: the Ascend driver's {library[1]} is not found; {cann.INSTALL_DRIVER}"
    if library:
        return f"torch_npu cannot be imported: CANN's {library[1]} is not found; {cann.how_to_source()}"
    if "undefined symbol" in text:
        remedy = cann_mismatch(cann.version()) or (
            f"it was built for another torch or CANN; supported: {_supported()}; then "
            "`pip install -r requirements-npu.txt`"
        )
        return f"torch_npu cannot be imported ({first}): {remedy}"
    variable = re.match(r"\w+", text)
    if "set_env.sh" in text and variable:
        return f"torch_npu cannot be imported: CANN's {variable[0]} is not set; {cann.how_to_source()}"
    return f"torch_npu cannot be imported ({first}); {cann.how_to_source()}"


def why_no_card(dev: str | os.PathLike[str] = "/dev", root: str | os.PathLike[str] = "/") -> str:
    """Why torch_npu finds no card after it was imported.

    Args:
      dev: folder of the device files.
      root: folder whose .dockerenv or run/.containerenv shows that this is a container.
    """
    dev, root = pathlib.Path(dev), pathlib.Path(root)
    cards = sorted(path.name for path in dev.glob("davinci[0-9]*"))
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if cards and visible is not None:
        return (
            f"torch_npu finds none of the {len(cards)} cards: ASCEND_RT_VISIBLE_DEVICES is {visible!r} (expected "
            "ascending numbers with commas and no spaces)"
        )
    if cards:
        return (
            f"torch_npu finds none of the cards {', '.join(cards)} in {dev}; `npu-smi info` shows their health, and "
            "the user must be in the group that owns these files (`ls -l`)"
        )
    if (root / ".dockerenv").exists() or (root / "run" / ".containerenv").exists():
        return (
            f"this container has no {dev}/davinci*; start it with --device=/dev/davinci0 (one for each card) "
            "--device=/dev/davinci_manager --device=/dev/devmm_svm --device=/dev/hisi_hdc "
            "-v /usr/local/Ascend/driver:/usr/local/Ascend/driver"
        )
    if (dev / "davinci_manager").exists():
        return "the Ascend driver is loaded but finds no card; see `npu-smi info` and `dmesg`"
    return f"torch_npu finds no NPU: no Ascend driver is loaded ({dev}/davinci_manager does not exist)"
