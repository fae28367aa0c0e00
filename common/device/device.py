"""Devices: with its parts device_missing.py and device_amp.py the only file that knows npu, cuda and their packages.

`auto` is npu, then cuda, then cpu. A device that was asked for and is missing is an error with its reason, never a
silent fallback.
"""

import contextlib
import ctypes
import dataclasses
import os

import torch

from common.device import amp, diagnosis
from common.errors import UserError
from common.parallel import usable_cores


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
    def has_fused_optimizers(self):
        """Whether the optimizers of torch.optim take fused=True here."""
        return self.kind in ("cpu", "cuda")

    @property
    def pins_memory(self):
        """Whether batches should be placed in page-locked memory first; untried on npu, so not there."""
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

    def check(self, config):
        """Raise UserError for options of a training that this device does not take."""
        self.memory_format(config.memory_format)
        if config.compile and self.kind == "npu":
            raise UserError("--compile: torch.compile is not supported on npu; leave it out")
        if config.amp_backend == "apex":
            amp.check_apex(self, config)
        if self.kind == "cpu" or torch.get_device_module(self.kind).is_initialized():
            self.amp_type(config.amp, config.amp_dtype)  # a launcher does not start the device to ask it

    def compute_float32_exactly(self):
        """Switch off the shortcuts of float32: HF32 on npu (its convolutions use it by default), TF32 on cuda."""
        if self.kind == "npu":
            torch.npu.conv.allow_hf32 = False
            torch.npu.matmul.allow_hf32 = False
        if self.kind == "cuda":
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False

    def make_sgd(self, groups, config):
        """SGD over parameter groups, in one fused kernel where there is one for what the run does.

        torch_npu's holds on to the gradient tensors of the first step; the exact reduction and apex replace them.
        """
        options = dict(lr=config.lr, momentum=config.momentum)
        native = config.amp_backend == "native"
        if self.kind == "npu" and native and config.reduce == "fast":
            import torch_npu

            if hasattr(torch_npu.optim, "NpuFusedSGD"):
                return torch_npu.optim.NpuFusedSGD(groups, **options)
        return torch.optim.SGD(groups, **options, fused=(native and self.has_fused_optimizers) or None)

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
        if amp_dtype == "bf16" and not self._has_bf16():
            raise UserError(f"--amp-dtype: bf16 is not in this chip ({self.describe()}); use fp16")
        if amp_dtype == "auto":
            return None if self.kind == "cpu" else "fp16"
        return amp_dtype

    def stored_amp_type(self, stored):
        """The precision that a checkpoint was trained with, where this device has it, else None (full precision)."""
        lacks = self.kind == "cpu" if stored == "fp16" else stored == "bf16" and not self._has_bf16()
        return None if lacks else stored

    def _has_bf16(self):
        return self.kind != "npu" or torch.npu.is_bf16_supported()


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


def choose(kind, index=0):
    """The Device for a --device word.

    Args:
      kind: "auto", "npu", "cuda" or "cpu". "auto" does not pass over a device whose package is installed but broken:
        hours on the CPU would be a bad surprise.
      index: number of the device on this machine; ignored on cpu.
    Raises:
      UserError: the device is missing (with the reason), or has fewer units than `index` needs.
    """
    wanted = kind
    if kind == "auto":
        kind = next((k for k in ("npu", "cuda") if diagnosis.why_missing(k) is None), "cpu")
        if kind == "cpu" and diagnosis.is_installed("npu"):
            kind = "npu"
    if kind == "cpu":
        return Device("cpu")
    reason = diagnosis.why_missing(kind)
    if reason:
        via = " (found by auto)" if wanted == "auto" else ""
        raise UserError(f"--device: {kind}{via} is not available: {reason}; --device cpu runs without it")
    count = torch.get_device_module(kind).device_count()
    if index >= count:
        raise UserError(f"--device: {kind}:{index} does not exist, this machine has {count}")
    return Device(kind, index)


def set_threads(threads, processes):
    """Set the CPU threads of this process: `threads`, else OMP_NUM_THREADS, else its share of the cores.

    Returns:
      the number.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads or (int(asked) if asked.isdigit() else 0) or max(1, usable_cores() // processes)
    torch.set_num_threads(threads)
    return threads
