"""torch.npu: cards, current card, random state, switches."""

import os
import pathlib
import sys

import torch

from torch_npu._calls import note
from torch_npu.npu import amp  # noqa: F401  torch.npu.amp

_state = {"initialized": False, "bad_fork": False, "current": 0}


def _forked():
    _state["bad_fork"] = _state["initialized"]


os.register_at_fork(after_in_child=_forked)


def _lazy_init():
    """First use of the device in this process."""
    if _state["bad_fork"]:
        raise RuntimeError(
            "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, you must use the 'spawn' "
            "start method"
        )
    if not device_count():
        raise RuntimeError("npu: no card (error code 107001 at aclrtSetDevice)")
    _state["initialized"] = True


def _check_index(index):
    if not 0 <= index < device_count():
        raise RuntimeError(f"npu: invalid device ID {index}, this machine has {device_count()} (error code 107001)")


def is_initialized():
    return _state["initialized"] and not _state["bad_fork"]


def _is_in_bad_fork():
    return _state["bad_fork"]


def is_available():
    return device_count() > 0


def device_count():
    return int(os.environ.get("FAKE_NPU_CARDS", "2"))


def current_device():
    return _state["current"]


def set_device(device):
    index = torch.device("npu", device).index if isinstance(device, int) else torch.device(device).index
    _lazy_init()
    _check_index(index)
    note("set_device", index)
    _state["current"] = index


def synchronize(device=None):
    _lazy_init()
    note("synchronize")


def get_device_name(device_name=None):
    return os.environ.get("FAKE_NPU_CHIP", "Ascend910B3")


# Memory of a card is the host's: what the process holds, and its peak.


def _status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def memory_reserved(device=None):
    _lazy_init()
    return _status("VmRSS")


def max_memory_reserved(device=None):
    _lazy_init()
    return _status("VmHWM")


def reset_peak_memory_stats(device=None):
    _lazy_init()
    note("reset_peak_memory_stats")
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def mem_get_info(device=None):
    _lazy_init()
    total = 32 * 2**30
    return total - memory_reserved(), total


def empty_cache():
    _lazy_init()
    note("empty_cache")


def is_bf16_supported():
    return not get_device_name().startswith(("Ascend910A", "Ascend910P", "Ascend310"))


def get_amp_supported_dtype():
    return [torch.float16] + ([torch.bfloat16] if is_bf16_supported() else [])


def manual_seed(seed):
    _lazy_init()


def manual_seed_all(seed):
    if is_initialized():
        _lazy_init()


def get_rng_state(device="npu"):
    return torch.random.get_rng_state()


def set_rng_state(new_state, device="npu"):
    torch.random.set_rng_state(new_state)


class device:  # noqa: N801  the name of the real one
    """Context: makes a card current."""

    def __init__(self, device):
        self.index = device if isinstance(device, int) else torch.device(device).index

    def __enter__(self):
        self.before = current_device()
        if self.index is not None:
            _state["current"] = self.index

    def __exit__(self, *error):
        _state["current"] = self.before


class _Switch:
    """torch.npu.conv and torch.npu.matmul: their one attribute says whether float32 may be computed as HF32."""

    def __init__(self, name, allow_hf32):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "allow_hf32", allow_hf32)

    def __setattr__(self, name, value):
        if name != "allow_hf32" or not isinstance(value, bool):
            raise RuntimeError(f"{self.name}.{name} must be a bool allow_hf32")
        note(f"{self.name}.allow_hf32", value)
        object.__setattr__(self, name, value)


conv, matmul = _Switch("conv", True), _Switch("matmul", False)
sys.modules["torch.npu"] = sys.modules[__name__]
