"""CANN, the software that torch_npu needs: where it is installed, and the environment variables of its HCCL."""

import os
import pathlib
import re
import subprocess

# Version files below ASCEND_HOME_PATH of CANN 8.5 and 9, 6 to 8.3, and the package for training alone.
_VERSION_FILES = ("*-linux/ascend_toolkit_install.info", "ascend_nnae_install.info", "version.cfg", "version.info")
_FIND_CANN = pathlib.Path(__file__).with_name("find_cann.sh")
INSTALL_DRIVER = (
    "install the driver, or mount /usr/local/Ascend/driver into the container and add its lib64/driver to "
    "LD_LIBRARY_PATH"
)
USE_DEVLIB = (  # atc needs no driver
    "this machine has no NPU driver, put CANN's devlib folder in LD_LIBRARY_PATH "
    "(/usr/local/Ascend/cann/<arch>-linux/devlib)"
)
_CONNECT_TIMEOUT_S = (120, 7200)  # what HCCL_CONNECT_TIMEOUT accepts; HCCL's default is 120


def home() -> str | None:
    """Folder of the CANN whose set_env.sh was sourced, or None."""
    return os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")


def version() -> str | None:
    """Version of that CANN, such as 8.3.RC1; None without CANN."""
    folder = pathlib.Path(home() or "")
    paths = [path for pattern in _VERSION_FILES for path in sorted(folder.glob(pattern))] if home() else []
    return next((found for path in paths if (found := read_version(path))), None)


def read_version(path: pathlib.Path) -> str | None:
    """The value of `version=` in a file of CANN or the driver, in any case.

    CANN 6 writes [1.84.15.1.310:6.0.1], of which the second is that of CANN.
    """
    found = re.search(
        r"^\s*\w*version\w*\s*=\s*\[?(?:[\w.-]+:)?([\w.-]+)",
        path.read_text(errors="replace"),
        re.MULTILINE | re.IGNORECASE,
    )
    return found and found[1]


def operator_chips() -> list[str] | None:
    """Chips, such as ascend310p, whose operators are installed; None without CANN.

    From CANN 8.5 on they are packages of their own, one for each chip.
    """
    opp = os.environ.get("ASCEND_OPP_PATH") or (home() and os.path.join(home() or "", "opp"))
    if not opp:
        return None
    found = pathlib.Path(opp).glob("built-in/op_impl/ai_core/tbe/config/*/aic-*-ops-info*.json")
    return sorted({path.parent.name for path in found})


def how_to_source() -> str:
    """The command that sets CANN's environment variables, for a message."""
    found = subprocess.run(["bash", _FIND_CANN], capture_output=True, text=True).stdout.strip()
    if found:
        return f"run `source {found}` first"
    return (
        "source CANN's set_env.sh first (usually /usr/local/Ascend/cann/set_env.sh, before CANN 8.5 "
        "/usr/local/Ascend/ascend-toolkit/set_env.sh)"
    )


def set_hccl_environment(local_addr: str, rendezvous_timeout_s: int) -> None:
    """Set HCCL's address and timeout for the ranks that this process starts. A variable that is set keeps its value.

    Does nothing without CANN.

    Args:
      local_addr: address of this machine; empty: HCCL chooses a network interface by its name.
      rendezvous_timeout_s: how long ranks wait for each other. HCCL needs it too: in the first step some nodes
        compile operators for minutes longer than others.
    """
    if home() is None:
        return
    if local_addr and "HCCL_SOCKET_IFNAME" not in os.environ:  # HCCL takes one of the two
        os.environ.setdefault("HCCL_IF_IP", local_addr)
    low, high = _CONNECT_TIMEOUT_S
    os.environ.setdefault("HCCL_CONNECT_TIMEOUT", str(min(max(rendezvous_timeout_s, low), high)))
