"""What NPUs need of a machine beside torch: package, CANN, driver, cards, ports. A part of common/device.py."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re

from common.device import finding, npu_smi

# Files in which CANN 8.5 and 9, 6 to 8.3, and its training-only package note their version, below ASCEND_HOME_PATH.
CANN_VERSIONS = ("*-linux/ascend_toolkit_install.info", "ascend_nnae_install.info", "version.cfg", "version.info")
HEALTHY = ("OK", "WARNING")
HCCL_PORTS = 16


def findings(kind, devices, several):
    """The findings for a kind of device; only npu needs more than its torch.

    Args:
      kind: "npu", "cuda", "cpu" or "auto".
      devices: how many of this machine must be there.
      several: whether ranks will find each other over HCCL.
    """
    if kind != "npu":
        return []
    return [_torch_npu(), _cann(), _driver(), _chips(devices), *_visible(devices), *(_hccl_ports() if several else ())]


def _torch_npu():
    try:
        return finding.Finding("torch_npu", importlib.metadata.version("torch_npu"))
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("torch_npu"):
            return finding.Finding("torch_npu", "found on PYTHONPATH, not installed by pip")
        return finding.Finding("torch_npu", "not installed", "`pip install -r requirements-npu.txt`")


def _cann():
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if not home:
        return finding.Finding(
            "CANN",
            "ASCEND_HOME_PATH is not set",
            "source CANN's set_env.sh (/usr/local/Ascend/cann, or ascend-toolkit before CANN 8.5); launchers do it",
        )
    version = next(
        (
            found
            for pattern in CANN_VERSIONS
            for path in sorted(pathlib.Path(home).glob(pattern))
            if (found := _version(path))
        ),
        None,
    )
    if version:
        return finding.Finding("CANN", f"{version} in {home}")
    return finding.Finding(
        "CANN",
        f"{home} (ASCEND_HOME_PATH) is no installation of CANN",
        "install CANN there, or source the set_env.sh of the one you have",
    )


def _version(path):
    """The value of `version=` in a file, in any case and with or without brackets, or None."""
    found = re.search(
        r"^\s*\w*version\w*\s*=\s*\[?([\w.:-]+)", path.read_text(errors="replace"), re.MULTILINE | re.IGNORECASE
    )
    return found and found[1]


def _driver():
    path = pathlib.Path(os.environ.get("ASCEND_INSTALL_PATH", "/usr/local/Ascend"), "driver", "version.info")
    if path.is_file() and (version := _version(path)):
        return finding.Finding("driver", version)
    return finding.Finding(
        "driver", f"{path} is not there", "install the Ascend driver; into a container, mount /usr/local/Ascend/driver"
    )


def _chips(devices):
    try:
        cards = npu_smi.cards()
    except npu_smi.NoAnswer as error:
        return finding.Finding("chips", str(error), "install the driver, or mount npu-smi into the container")
    names = ", ".join(sorted({name for _, name, _ in cards}))
    ill = [f"{number} ({health})" for number, _, health in cards if health.upper() not in HEALTHY]
    if len(cards) < devices:
        return finding.Finding(
            "chips",
            f"{len(cards)} ({names or 'none'}), {devices} wanted",
            "give a smaller --devices, or look at `npu-smi info` and `dmesg`",
        )
    if ill:
        return finding.Finding(
            "chips",
            f"{len(cards)} ({names}), not well: {', '.join(ill)}",
            "look at `npu-smi info -t health -i NUMBER`; leave them out with "
            "ASCEND_RT_VISIBLE_DEVICES, or restart the machine",
        )
    return finding.Finding("chips", f"{len(cards)} ({names})")


def _visible(devices):
    """ASCEND_RT_VISIBLE_DEVICES, where set: cards behind the first wrong token vanish without a word."""
    text = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if text is None:
        return
    numbers = [int(word) for word in text.split(",") if word.isdigit()]
    right = re.fullmatch(r"\d+(,\d+)*", text) and numbers == sorted(set(numbers))
    if right and len(numbers) >= devices:
        yield finding.Finding("visible devices", text)
    else:
        yield finding.Finding(
            "visible devices",
            f"ASCEND_RT_VISIBLE_DEVICES is {text!r}",
            f"give at least {devices} ascending number(s) with commas and no spaces, or unset it",
        )


def _hccl_ports():
    """The ports at which the ranks of several devices find each other."""
    first = os.environ.get("HCCL_IF_BASE_PORT", "60000")
    if not first.isdigit() or not 1024 <= int(first) <= 65535 - HCCL_PORTS:
        yield finding.Finding("HCCL ports", f"HCCL_IF_BASE_PORT is {first}", f"give 1024 to {65535 - HCCL_PORTS}")
        return
    remedy = f"end the programs that have them, or set HCCL_IF_BASE_PORT to the first of {HCCL_PORTS} free ones"
    yield finding.ports("HCCL ports", range(int(first), int(first) + HCCL_PORTS), remedy)
