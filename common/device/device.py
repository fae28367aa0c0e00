"""Selection and properties of the device: npu, cuda or cpu.

`auto` is npu, then cuda, then cpu. A device that was asked for and is missing is an error with its reason, never a
silent fallback.
"""

import contextlib
import ctypes
import dataclasses
import inspect
import os
import re
import typing
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from common.device import amp, cann_failure, diagnosis
from common.errors import UserError
from common.parallel import usable_cores

_Optimizer = typing.TypeVar("_Optimizer", bound=torch.optim.Optimizer)
_UNCOMPILED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")  # methods of optimizers
TORCHAIR_CHIPS = r"Ascend(910B\d|910_93|950)"  # Atlas A2, A3 and 950, by its overview


@dataclasses.dataclass(frozen=True, match_args=False)  # read-only members, as those of TrainConfig
class DeviceOptions(amp.PrecisionOptions, Protocol):
    """Fields of TrainConfig that depend on the device."""

    amp: bool
    amp_dtype: str
    memory_format: str
    compile: bool
    reduce: str
    lr: float
    momentum: float


def exhausted_memory(error: Exception) -> str:
    """The first line of an exception for lack of device or host memory; empty for any other one."""
    line = (str(error).splitlines() or [""])[0]
    is_memory = "out of memory" in line or "can't allocate memory" in line  # cuda and npu; cpu
    return line or "MemoryError" if is_memory or isinstance(error, MemoryError) else ""


@dataclasses.dataclass(frozen=True)
class Device:
    """One device of one process.

    Attributes:
      kind: "npu", "cuda" or "cpu".
      index: number of the device on this machine; 0 on cpu.
    """

    kind: str
    index: int = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.kind) if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def backend(self) -> str:
        """Backend of the process group that reduces gradients."""
        return {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}[self.kind]

    @property
    def has_fused_optimizers(self) -> bool:
        """Whether the optimizers of torch.optim take fused=True here."""
        return self.kind in ("cpu", "cuda")

    @property
    def pin_memory(self) -> bool:
        """Whether dataloaders pin their batches; untested on npu, so off there."""
        return self.kind == "cuda"

    def describe(self) -> str:
        """Name of the hardware for logs and result rows."""
        if self.kind == "cpu":
            return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
        return f"{self.kind}:{self.index} ({torch.get_device_module(self.kind).get_device_name(self.index)})"

    def activate(self) -> None:
        """Make this the current device of the process; call before creating tensors or process groups."""
        if self.kind == "cpu":
            _keep_freed_memory()
        else:
            torch.get_device_module(self.kind).set_device(self.index)

    def move(self, model: torch.nn.Module, memory_format: str) -> None:
        """Move a network to this device, in the memory format "nchw" or "channels_last"."""
        to: Any = model.to  # torch's annotations lack memory_format
        to(self.torch_device, memory_format=torch_memory_format(memory_format))

    def synchronize(self) -> None:
        """Wait until the device has finished its work, for measuring time on the host."""
        if self.kind != "cpu":
            torch.get_device_module(self.kind).synchronize()

    def check(self, options: DeviceOptions) -> None:
        """Raise UserError for training options that this device does not support."""
        self.memory_format(options.memory_format)
        if options.compile and self.kind == "npu":
            raise UserError(
                "--compile: torch.compile is not supported on npu for training: torchair, the compiler of torch_npu, "
                "is for inference; leave it out"
            )
        if options.amp_backend == "apex":
            amp.check_apex(self.kind, options)
        # The launcher does not initialize a device, so there this check is left to the ranks.
        if self.kind == "cpu" or torch.get_device_module(self.kind).is_initialized():
            self.amp_type(options.amp, options.amp_dtype)

    def compile_for_evaluation(self, network: torch.nn.Module) -> Any:
        """torch.compile a network whose gradients are not needed; on npu with torchair.

        Raises:
          UserError: there is no torchair, or not for this chip.
        """
        if self.kind != "npu":
            return torch.compile(network, dynamic=False)
        chip = torch.get_device_module("npu").get_device_name(self.index)
        if not re.match(TORCHAIR_CHIPS, chip):
            raise UserError(
                f"--compile: torchair, the compiler of torch_npu, is for Atlas A2, A3 and 950, not {chip}; leave it out"
            )
        try:
            import torchair  # torch_npu brings it, under this name

            backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
        except ModuleNotFoundError as error:
            raise UserError(f"--compile: the compiler of torch_npu is missing ({error}); leave it out") from error
        except Exception as error:  # noqa: BLE001  of any type, with an incomplete CANN
            reason = cann_failure.explain(f"{type(error).__name__}: {error}")
            raise UserError(f"--compile: torchair does not start ({reason}); leave it out") from error
        return torch.compile(network, backend=backend, dynamic=False)

    def use_full_fp32(self) -> None:
        """Compute float32 in full precision: no HF32 on npu (default for its convolutions), no TF32 on cuda."""
        if self.kind == "npu":
            torch.get_device_module("npu").conv.allow_hf32 = False
            torch.get_device_module("npu").matmul.allow_hf32 = False
        if self.kind == "cuda":
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False

    def make_sgd(self, groups: Iterable[dict[str, Any]], options: DeviceOptions) -> torch.optim.Optimizer:
        """SGD over parameter groups, fused where possible.

        torch_npu's fused SGD keeps the gradient tensors of the first step, so it cannot be used with --reduce exact or
        apex, which replace them.
        """
        native = options.amp_backend == "native"
        if self.kind == "npu" and native and options.reduce == "fast":
            import torch_npu

            if hasattr(torch_npu.optim, "NpuFusedSGD"):
                return torch_npu.optim.NpuFusedSGD(groups, lr=options.lr, momentum=options.momentum)
        fused = (native and self.has_fused_optimizers) or None
        return eager(torch.optim.SGD)(groups, lr=options.lr, momentum=options.momentum, fused=fused)

    def memory_format(self, wanted: str) -> str:
        """Resolve --memory-format: channels_last is faster on cpu and cuda; npu has formats of its own."""
        if wanted == "channels_last" and self.kind == "npu":
            raise UserError("--memory-format: channels_last is not supported on npu; use nchw")
        if wanted == "auto":
            wanted = "nchw" if self.kind == "npu" else "channels_last"
        return wanted

    def amp_type(self, amp: bool, amp_dtype: str) -> str | None:
        """Resolve --amp and --amp-dtype to "fp16", "bf16" or None (full precision)."""
        if not amp:
            return None
        if amp_dtype == "fp16" and self.kind == "cpu":
            raise UserError("--amp-dtype: fp16 is for npu and cuda; use bf16 on cpu")
        if amp_dtype == "bf16" and not self._has_bf16():
            raise UserError(f"--amp-dtype: bf16 is not supported by this chip ({self.describe()}); use fp16")
        if amp_dtype == "auto":
            return None if self.kind == "cpu" else "fp16"
        return amp_dtype

    def stored_amp_type(self, stored: str | None) -> str | None:
        """The amp_type in a checkpoint if this device supports it, else None (full precision)."""
        lacks = self.kind == "cpu" if stored == "fp16" else stored == "bf16" and not self._has_bf16()
        return None if lacks else stored

    def _has_bf16(self) -> bool:
        return self.kind != "npu" or torch.get_device_module("npu").is_bf16_supported()


def eager(optimizer: type[_Optimizer]) -> type[_Optimizer]:
    """An optimizer class of torch.optim that never imports torch.compile, which takes more than a second.

    torch wraps these methods so that torch.compile leaves them alone; no optimizer is compiled here.
    """
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in _UNCOMPILED}
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))
    return typing.cast("type[_Optimizer]", type(optimizer.__name__, (optimizer,), methods))


def _keep_freed_memory() -> None:
    """Make glibc keep large freed blocks for reuse instead of returning them to the system.

    Every training step frees and allocates gigabytes of activations; the kernel zeroes each new page. No effect with
    another C library.
    """
    trim_threshold, mmap_max = -1, -4  # <malloc.h>
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def torch_memory_format(name: str) -> torch.memory_format:
    """torch's constant for "nchw" or "channels_last"."""
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


def choose(kind: str, index: int = 0) -> Device:
    """The Device for --device.

    Args:
      kind: "auto", "npu", "cuda" or "cpu". "auto" does not skip an npu whose package is installed but broken: training
        on the CPU instead would waste hours.
      index: number of the device on this machine; ignored on cpu.
    Raises:
      UserError: the device is missing (with the reason), or there is no device `index`.
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


def set_threads(threads: int | None, processes: int) -> int:
    """Set the CPU threads of this process: `threads`, else OMP_NUM_THREADS, else its share of the cores.

    Args:
      processes: number of processes on this machine that share the cores.
    Returns:
      the number of threads.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = threads or (int(asked) if asked.isdigit() else 0) or max(1, usable_cores() // processes)
    torch.set_num_threads(threads)
    return threads
