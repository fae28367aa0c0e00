"""Devices: the only file that knows npu, cuda and their packages.

`auto` is npu, then cuda, then cpu. A device that was asked for and is missing is an error with its reason, never a
silent fallback.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os

import torch

from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """One device of one process.

    Attributes:
      kind: "npu", "cuda" or "cpu".
      index: its number on this machine; 0 on cpu.
    """

    kind: str
    index: int = 0

    @property
    def torch(self):
        """The torch.device."""
        return torch.device(self.kind) if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def backend(self):
        """Name of the process-group backend that moves gradients."""
        return {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}[self.kind]

    @property
    def has_fused_sgd(self):
        """Whether torch.optim.SGD(fused=True) works here."""
        return self.kind in ("cpu", "cuda")

    @property
    def pins_memory(self):
        """Whether batches should be placed in page-locked memory first."""
        return self.kind == "cuda"

    def describe(self):
        """Name of the hardware for logs and result rows."""
        if self.kind == "cpu":
            return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
        return f"{self.kind}:{self.index} ({torch.get_device_module(self.kind).get_device_name(self.index)})"

    def activate(self):
        """Make this the current device of the process; before any tensor or process group is created."""
        if self.kind == "cpu":
            _keep_freed_memory()
        else:
            torch.get_device_module(self.kind).set_device(self.index)

    def synchronize(self):
        """Wait for the device, so that a host clock measures finished work."""
        if self.kind != "cpu":
            torch.get_device_module(self.kind).synchronize()

    def memory_format(self, wanted):
        """Resolve --memory-format: channels_last is faster on cpu and cuda; npu keeps layouts of its own."""
        if wanted == "channels_last" and self.kind == "npu":
            raise UserError("--memory-format: channels_last is not supported on npu; use nchw")
        if wanted == "auto":
            wanted = "nchw" if self.kind == "npu" else "channels_last"
        return wanted

    def amp_type(self, amp, amp_dtype):
        """Resolve --amp and --amp-dtype to "fp16", "bf16" or None (full precision)."""
        if not amp:
            return None
        if amp_dtype == "fp16" and self.kind == "cpu":
            raise UserError("--amp-dtype: fp16 is for npu and cuda; use bf16 on cpu")
        if amp_dtype == "auto":
            return None if self.kind == "cpu" else "fp16"
        return amp_dtype


def _keep_freed_memory():
    """Ask glibc to reuse large blocks instead of giving them back to the system.

    A training step frees and allocates the same gigabytes of activations as the one before; from the system they come
    as new pages, which the kernel must clear one by one. Where the C library is another one, nothing changes.
    """
    trim_threshold, mmap_max = -1, -4  # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def torch_memory_format(name):
    """torch's constant for "nchw" or "channels_last"."""
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def autocast(device, amp_type):
    """Autocast context; does nothing where amp_type is None."""
    if amp_type is None:
        return contextlib.nullcontext()
    return torch.autocast(device.kind, torch.float16 if amp_type == "fp16" else torch.bfloat16)


class LossScaler:
    """Scaling of fp16 losses, static or dynamic; every method does nothing special when fp16 is off.

    A step whose gradients overflow is skipped in both modes; a static scale stays what it is.
    """

    def __init__(self, device, amp_type, loss_scale):
        enabled = amp_type == "fp16"
        self._static = None if loss_scale == "dynamic" or not enabled else float(loss_scale)
        initial = 2.0**16 if loss_scale == "dynamic" else float(loss_scale)
        if device.kind == "npu":
            # torch_npu's own scaler: it also sees overflow on chips that saturate instead of producing infinities.
            self._scaler = torch.npu.amp.GradScaler(
                init_scale=initial, dynamic=loss_scale == "dynamic", enabled=enabled
            )
        else:
            self._scaler = torch.amp.GradScaler(device.kind, init_scale=initial, enabled=enabled)

    def scale(self, loss):
        return self._scaler.scale(loss)

    def unscale(self, optimizer):
        """Bring the gradients to their true size before the step, for clipping."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer):
        """Unscale, step unless the gradients overflowed, and adapt a dynamic scale."""
        self._scaler.step(optimizer)
        self._scaler.update(self._static)

    def state_dict(self):
        return self._scaler.state_dict()

    def load_state_dict(self, state):
        self._scaler.load_state_dict(state)


def choose(kind, index=0):
    """The Device for a --device word.

    Args:
      kind: "auto", "npu", "cuda" or "cpu".
      index: number of the device on this machine; ignored on cpu.
    Raises:
      UserError: the device is missing (with the reason), or has fewer units than `index` needs.
    """
    if kind == "auto":
        kind = next((k for k in ("npu", "cuda") if _why_missing(k) is None), "cpu")
    if kind == "cpu":
        return Device("cpu")
    reason = _why_missing(kind)
    if reason:
        raise UserError(f"--device: {kind} is not available: {reason}; --device cpu runs without it")
    count = torch.get_device_module(kind).device_count()
    if index >= count:
        raise UserError(f"--device: {kind}:{index} does not exist, this machine has {count}")
    return Device(kind, index)


def _why_missing(kind):
    """Why a kind of device cannot be used, or None when it can."""
    if kind == "cuda":
        if torch.version.cuda is None:
            return "this torch is a CPU build"
        return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU or driver"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed (requirements-npu.txt)"
    try:
        import torch_npu  # noqa: F401  registers the npu device
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu does not load ({str(error).splitlines()[0]}); source CANN's set_env.sh first"
    return None if torch.npu.is_available() else "torch_npu sees no NPU"


def set_threads(threads, processes):
    """Set the CPU threads of this process: `threads`, else OMP_NUM_THREADS, else its share of the cores.

    Returns:
      the number.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads or (int(asked) if asked.isdigit() else 0) or max(1, len(os.sched_getaffinity(0)) // processes)
    torch.set_num_threads(threads)
    return threads
