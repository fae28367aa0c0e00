"""Preflight checks for NPUs: torch_npu, CANN, driver, cards, visible devices, HCCL's ports."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Iterator

from common.device import cann, diagnosis, npu_smi, versions
from common.device.finding import Finding, check_ports
from common.errors import UserError

HEALTHY = ("OK", "WARNING")
NOT_REPORTED = ("NA", "N/A", "-", "--")  # health in some containers and virtual machines
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
    checks = [_check_torch_npu(), *_check_cann(), *_check_operators(), _check_driver(), _check_chips(devices)]
    checks += _check_visible_devices(devices)
    return checks + ([_check_hccl_ports()] if several else [])


def _check_torch_npu() -> Finding:
    try:
        version = importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("torch_npu"):
            return Finding("torch_npu", "found on PYTHONPATH, not installed by pip")
        return Finding("torch_npu", "not installed", "`pip install -r requirements-npu.txt`")
    mismatch = diagnosis.release_mismatch(version, importlib.metadata.version("torch"))
    if mismatch:
        found, _, remedy = mismatch.partition("; ")
        return Finding("torch_npu", found, remedy)
    listed = versions.torch_npu(version)
    if listed is None:
        return Finding("torch_npu", f"{version}, which the table of tested pairs (docs/ASCEND.md) lacks")
    return Finding("torch_npu", f"{version}, built for CANN {listed.cann}{' (beta)' if listed.is_beta else ''}")


def _check_cann() -> Iterator[Finding]:
    """CANN, and whether torch_npu, Python and NumPy go with it."""
    home, version = cann.home(), cann.version()
    if not home:
        yield Finding("CANN", "ASCEND_HOME_PATH is not set", f"{cann.how_to_source()}; launchers do it")
        return
    if not version:
        found = f"{home} (ASCEND_HOME_PATH) does not hold CANN"
        yield Finding("CANN", found, "install CANN there, or source the set_env.sh of an installed one")
        return
    yield Finding("CANN", f"{version} in {home}", diagnosis.cann_mismatch(version) or "")
    series, python = versions.cann(version), sys.version_info[:2]
    if series is None:
        return
    if series.python and not series.takes_python(python):
        low, high = series.python
        remedy = f"use a Python of {low} to {high}, or a newer CANN"
        yield Finding("Python for CANN", f"{python[0]}.{python[1]}, CANN {series.cann} takes {low} to {high}", remedy)
    numpy = importlib.metadata.version("numpy")
    if not series.takes_numpy(numpy, python):
        found = f"{numpy}, the operator compiler of CANN {series.cann} takes {series.numpy}"
        yield Finding("NumPy for CANN", found, "`pip install 'numpy<2'`")


def _check_operators() -> Iterator[Finding]:
    """The operators of this machine's chip: without them everything ends with "No supported Ops kernel"."""
    installed = cann.operator_chips()
    if installed is None or cann.version() is None:
        return
    try:
        chip = npu_smi.detect_chip_name()
    except UserError:  # _check_chips says why
        return
    if npu_smi.operator_folder(chip) in installed:
        yield Finding("operators", ", ".join(installed))
        return
    found = f"{', '.join(installed) or 'none'} in {cann.home()}, none for {chip}"
    yield Finding("operators", found, f"install {npu_smi.operator_package(chip)}, which CANN needs from 8.5 on")


def _check_driver() -> Finding:
    path = pathlib.Path(os.environ.get("ASCEND_INSTALL_PATH", "/usr/local/Ascend"), "driver", "version.info")
    if path.is_file() and (version := cann.read_version(path)):
        return Finding("driver", version)
    remedy = "install the Ascend driver; into a container, mount /usr/local/Ascend/driver"
    return Finding("driver", f"{path} does not exist", remedy)


def _check_chips(devices: int) -> Finding:
    try:
        cards = npu_smi.cards()
    except npu_smi.NpuSmiError as error:
        return Finding("chips", str(error), error.remedy)
    found = f"{len(cards)} ({', '.join(sorted({name for _, name, _ in cards})) or 'none'})"
    if len(cards) < devices:
        remedy = "give a smaller --devices, or look at `npu-smi info` and `dmesg`"
        return Finding("chips", f"{found}, {devices} wanted", remedy)
    silent = [number for number, _, health in cards if health.upper() in NOT_REPORTED]
    if silent:
        found += f", health not reported: {', '.join(silent)}"
    unhealthy = [
        f"{number} ({health})" for number, _, health in cards if health.upper() not in (*HEALTHY, *NOT_REPORTED)
    ]
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
    ports = range(int(first), int(first) + HCCL_PORTS)
    remedy = (
        f"end the programs that use them, or set HCCL_IF_BASE_PORT to the first of {HCCL_PORTS} free ones; "
        f"sysctl -w net.ipv4.ip_local_reserved_ports={ports[0]}-{ports[-1]} keeps Linux from giving them to programs "
        "that ask for any port"
    )
    return check_ports("HCCL ports", ports, remedy)
