"""Preflight checks for NPUs: torch_npu, CANN, driver, cards, visible devices, HCCL's ports."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator

from common.device import cann, npu_smi
from common.device.finding import Finding, check_ports

# Version files below ASCEND_HOME_PATH of CANN 8.5 and 9, 6 to 8.3, and the package for training alone.
CANN_VERSIONS = ("*-linux/ascend_toolkit_install.info", "ascend_nnae_install.info", "version.cfg", "version.info")
HEALTHY = ("OK", "WARNING")
HCCL_PORTS = 16


def run_checks(kind: str, devices: int, several: bool) -> list[Finding]:
    """Check what a kind of device needs besides torch; only npu needs anything.

    Args:
      kind: "npu", "cuda", "cpu" or "auto".
      devices: devices of this machine that the training uses.
      several: whether several ranks communicate over HCCL.
    """
    if kind != "npu":
        return []
    checks = [_check_torch_npu(), _check_cann(), _check_driver(), _check_chips(devices)]
    checks += _check_visible_devices(devices)
    return checks + ([_check_hccl_ports()] if several else [])


def _check_torch_npu() -> Finding:
    try:
        return Finding("torch_npu", importlib.metadata.version("torch_npu"))
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("torch_npu"):
            return Finding("torch_npu", "found on PYTHONPATH, not installed by pip")
        return Finding("torch_npu", "not installed", "`pip install -r requirements-npu.txt`")


def _check_cann() -> Finding:
    home = cann.home()
    if not home:
        remedy = f"{cann.how_to_source()}; launchers do it"
        return Finding("CANN", "ASCEND_HOME_PATH is not set", remedy)
    paths = [path for pattern in CANN_VERSIONS for path in sorted(pathlib.Path(home).glob(pattern))]
    versions = [version for path in paths if (version := _version(path))]
    if versions:
        return Finding("CANN", f"{versions[0]} in {home}")
    return Finding(
        "CANN",
        f"{home} (ASCEND_HOME_PATH) does not hold CANN",
        "install CANN there, or source the set_env.sh of an installed one",
    )


def _version(path: pathlib.Path) -> str | None:
    """The value of `version=` in a file, in any case and with or without brackets."""
    found = re.search(
        r"^\s*\w*version\w*\s*=\s*\[?([\w.:-]+)", path.read_text(errors="replace"), re.MULTILINE | re.IGNORECASE
    )
    return found and found[1]


def _check_driver() -> Finding:
    path = pathlib.Path(os.environ.get("ASCEND_INSTALL_PATH", "/usr/local/Ascend"), "driver", "version.info")
    if path.is_file() and (version := _version(path)):
        return Finding("driver", version)
    remedy = "install the Ascend driver; into a container, mount /usr/local/Ascend/driver"
    return Finding("driver", f"{path} does not exist", remedy)


def _check_chips(devices: int) -> Finding:
    try:
        cards = npu_smi.cards()
    except npu_smi.NpuSmiError as error:
        return Finding("chips", str(error), "install the driver, or mount npu-smi into the container")
    found = f"{len(cards)} ({', '.join(sorted({name for _, name, _ in cards})) or 'none'})"
    if len(cards) < devices:
        remedy = "give a smaller --devices, or look at `npu-smi info` and `dmesg`"
        return Finding("chips", f"{found}, {devices} wanted", remedy)
    unhealthy = [f"{number} ({health})" for number, _, health in cards if health.upper() not in HEALTHY]
    if unhealthy:
        return Finding(
            "chips",
            f"{found}, unhealthy: {', '.join(unhealthy)}",
            "look at `npu-smi info -t health -i NUMBER`; leave them out with "
            "ASCEND_RT_VISIBLE_DEVICES, or restart the machine",
        )
    return Finding("chips", found)


def _check_visible_devices(devices: int) -> Iterator[Finding]:
    """ASCEND_RT_VISIBLE_DEVICES if set: the runtime silently ignores all cards after the first wrong item."""
    text = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if text is None:
        return
    numbers = [int(word) for word in text.split(",") if word.isdigit()]
    valid = re.fullmatch(r"\d+(,\d+)*", text) and numbers == sorted(set(numbers))
    if valid and len(numbers) >= devices:
        yield Finding("visible devices", text)
    else:
        remedy = f"give at least {devices} ascending number(s) with commas and no spaces, or unset it"
        yield Finding("visible devices", f"ASCEND_RT_VISIBLE_DEVICES is {text!r}", remedy)


def _check_hccl_ports() -> Finding:
    """The TCP ports on which the ranks of several devices connect."""
    first = os.environ.get("HCCL_IF_BASE_PORT", "60000")
    if not first.isdigit() or not 1024 <= int(first) <= 65535 - HCCL_PORTS:
        return Finding("HCCL ports", f"HCCL_IF_BASE_PORT is {first}", f"give 1024 to {65535 - HCCL_PORTS}")
    remedy = f"end the programs that use them, or set HCCL_IF_BASE_PORT to the first of {HCCL_PORTS} free ones"
    return check_ports("HCCL ports", range(int(first), int(first) + HCCL_PORTS), remedy)
