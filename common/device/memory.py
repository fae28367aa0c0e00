"""Memory of a device: how much this process may take, and how much a piece of work takes at most."""

import contextlib
import math
import pathlib

import torch

from common.device.device import Device
from common.errors import UserError

# Share of the free memory that a process may take. Of an accelerator, nearly all: fragments and the buffers of
# collectives need the rest. Host memory also holds dataloader workers, and Linux kills instead of refusing.
_SHARE, _SHARE_OF_HOST = 0.9, 0.5
# Controller of control groups -> files with limit and use: version 2, version 1.
_LIMITS = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}


class MemoryMeter:
    """Peak memory of a process on its device, in bytes.

    Args:
      processes: processes on this machine that share the host's memory.
    Attributes:
      budget: what the process may hold, with what it holds now.
    Raises:
      UserError: the memory of the host cannot be read.
    """

    def __init__(self, device: Device, processes: int) -> None:
        self._kind = device.kind
        if device.kind != "cpu":
            held = torch.get_device_module(device.kind).memory_reserved(device.index)
            free = torch.get_device_module(device.kind).mem_get_info(device.index)[0]
            self.budget: float = held + _SHARE * free
            return
        try:
            groups = pathlib.Path("/proc/self/cgroup").read_text()
            free = min(_fields("/proc/meminfo")["MemAvailable"], _free_below_limits(groups))
            self.budget = _fields("/proc/self/status")["VmRSS"] + _SHARE_OF_HOST * free / processes
        except (OSError, KeyError) as error:
            raise UserError(f"--batch-size: auto, but the free memory of cpu cannot be read ({error})") from error

    def start(self) -> None:
        """Forget the peak so far."""
        if self._kind == "cpu":
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.get_device_module(self._kind).empty_cache()
            torch.get_device_module(self._kind).reset_peak_memory_stats()

    def peak(self) -> int:
        """Largest number of bytes held since `start`."""
        if self._kind == "cpu":
            return _fields("/proc/self/status")["VmHWM"]
        return torch.get_device_module(self._kind).max_memory_reserved()

    def release(self) -> None:
        """Return what is cached and not used."""
        if self._kind != "cpu":
            torch.get_device_module(self._kind).empty_cache()


def _fields(path: str) -> dict[str, int]:
    """Entries `Name:  123 kB` of a file of /proc, in bytes."""
    words = (line.split() for line in pathlib.Path(path).read_text().splitlines())
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in words if line[-1:] == ["kB"]}


def _free_below_limits(groups: str, root: pathlib.Path = pathlib.Path("/sys/fs/cgroup")) -> float:
    """Bytes left below the limits of the control groups of a /proc/self/cgroup; infinite without; caches are free."""
    free, paths = math.inf, dict(line.split(":", 2)[1:] for line in groups.splitlines())
    for controller, names in _LIMITS.items():
        top = root / controller
        group = top / paths.get(controller, "/").lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            with contextlib.suppress(OSError, ValueError):  # not in this container, or without limit
                limit, used = (int((folder / name).read_text()) for name in names)
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, limit - used + int(statistics["inactive_file"]))
    return free
