"""Mixed precision: torch.autocast with a loss scale, or apex."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import pathlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import UserError


@dataclasses.dataclass(frozen=True, match_args=False)  # read-only members, as those of TrainConfig
class PrecisionOptions(Protocol):
    """Fields of TrainConfig that mixed precision reads."""

    amp_backend: str
    opt_level: str | None
    loss_scale: str
    combine_grad: bool


def autocast(device_kind: str, amp_type: str | None) -> contextlib.AbstractContextManager:
    """Autocast context; does nothing if amp_type is None."""
    if amp_type is None:
        return contextlib.nullcontext()
    return torch.autocast(device_kind, torch.float16 if amp_type == "fp16" else torch.bfloat16)


def prepare(
    model: nn.Module, optimizer: Optimizer, device_kind: str, amp_type: str | None, options: PrecisionOptions
) -> "tuple[nn.Module, Optimizer, NativePrecision | ApexPrecision]":
    """Set up mixed precision for a model that is on its device and not yet wrapped in DistributedDataParallel.

    Args:
      amp_type: "fp16", "bf16" or None, from Device.amp_type.
    Returns:
      (model, optimizer, precision); the training step calls the methods of `precision`.
    """
    if options.amp_backend == "native":
        return model, optimizer, NativePrecision(device_kind, amp_type, options.loss_scale)
    amp = _import_apex(device_kind, options)
    more = {"combine_grad": True} if options.combine_grad else {}
    scale = options.loss_scale if options.loss_scale == "dynamic" else float(options.loss_scale)
    level = options.opt_level or "O2"
    model, optimizer = amp.initialize(model, optimizer, opt_level=level, loss_scale=scale, verbosity=0, **more)
    return model, optimizer, ApexPrecision(amp)


class NativePrecision:
    """torch.autocast, with a static or dynamic loss scale for fp16; full precision if amp_type is None.

    A step whose gradients overflow is skipped in both modes; a static scale keeps its value.

    Attributes:
      evaluation_type: amp_type for evaluation.
    """

    def __init__(self, device_kind: str, amp_type: str | None, loss_scale: str) -> None:
        self._device_kind, self.evaluation_type = device_kind, amp_type
        enabled = amp_type == "fp16"
        self._static = None if loss_scale == "dynamic" or not enabled else float(loss_scale)
        initial = 2.0**16 if loss_scale == "dynamic" else float(loss_scale)
        if device_kind == "npu":
            # torch_npu's scaler also detects overflow on chips that saturate instead of producing inf. With
            # dynamic=False it would not check for overflow, so a static scale is restored after each step instead.
            self._scaler = torch.get_device_module("npu").amp.GradScaler(
                init_scale=initial, dynamic=True, enabled=enabled
            )
        else:
            self._scaler = torch.amp.GradScaler(device_kind, init_scale=initial, enabled=enabled)

    def forward(self) -> contextlib.AbstractContextManager:
        """Context of forward pass and loss."""
        return autocast(self._device_kind, self.evaluation_type)

    def backward(self, loss: Tensor, optimizer: Optimizer, is_last: bool) -> None:
        """Backward pass of a micro-batch's loss; is_last: the optimizer step follows."""
        self._scaler.scale(loss).backward()

    def unscaled_parameters(self, model: nn.Module, optimizer: Optimizer) -> Iterable[nn.Parameter]:
        """Unscale the gradients and return the parameters that have them, for clipping."""
        self._scaler.unscale_(optimizer)
        return model.parameters()

    def step(self, optimizer: Optimizer) -> None:
        """Unscale, step unless the gradients overflowed, and update a dynamic scale."""
        self._scaler.step(optimizer)
        self._scaler.update(self._static)

    def state_dict(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the scaler state of any kind of device; an empty one (trained without fp16) changes nothing."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict({**self._scaler.state_dict(), **state})


class ApexPrecision:
    """apex, Ascend's or NVIDIA's: O1 (patched functions that cast) or O2 (fp16 weights with float32 master weights).

    With a static scale apex makes every step, even if gradients overflow; with a dynamic one it skips those.
    """

    evaluation_type = None  # apex has already patched the network or torch's functions; no autocast on top

    def __init__(self, amp: Any) -> None:
        self._amp = amp

    def forward(self) -> contextlib.AbstractContextManager:
        """Context of forward pass and loss."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, optimizer: Optimizer, is_last: bool) -> None:
        """Backward pass of a micro-batch's loss; apex unscales the gradients with the last one of a step."""
        with self._amp.scale_loss(loss, optimizer, delay_unscale=not is_last) as scaled:
            scaled.backward()

    def unscaled_parameters(self, model: nn.Module, optimizer: Optimizer) -> Iterable[nn.Parameter]:
        """The parameters to clip: O2's float32 master weights."""
        return list(self._amp.master_params(optimizer))

    def step(self, optimizer: Optimizer) -> None:
        """Step; apex has replaced optimizer.step by a no-op if a dynamic scale overflowed."""
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self._amp.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load apex's state; ignore that of native autocast, which has other entries."""
        if "loss_scaler0" in state:
            self._amp.load_state_dict(state)


def check_apex(device_kind: str, options: PrecisionOptions) -> None:
    """Raise UserError if --amp-backend apex cannot work: device, options, package."""
    if device_kind == "cpu":
        raise UserError("--amp-backend: apex is for npu and cuda; leave it out on cpu")
    _import_apex(device_kind, options)


_SOURCES = {"npu": "Ascend's (gitcode.com/ascend/apex)", "cuda": "NVIDIA's (github.com/NVIDIA/apex)"}


def _import_apex(device_kind: str, options: PrecisionOptions) -> ModuleType:
    """The module apex.amp.

    Raises:
      UserError: apex is missing, is PyPI's unrelated package, cannot be imported, or lacks combine_grad.
    """
    remedy = f"install {_SOURCES[device_kind]}, or use --amp-backend native"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise UserError(f"--amp-backend: apex is not installed; {remedy}")
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "amp").is_dir() or (folder / "amp.py").is_file() for folder in folders):
        raise UserError(
            f"--amp-backend: the installed package apex{_version_and_summary('apex')} is PyPI's, which is unrelated to "
            f"mixed precision (no apex.amp); `pip uninstall apex`, then {remedy}"
        )
    try:
        from apex import amp
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--amp-backend: apex cannot be imported ({reason}); {remedy}") from error
    if options.combine_grad and "combine_grad" not in inspect.signature(amp.initialize).parameters:
        raise UserError("--combine-grad: this apex has no combine_grad (Ascend's has); leave it out")
    return amp


def _version_and_summary(package: str) -> str:
    """Version and summary of an installed package, or an empty string."""
    try:
        about = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f" {about['Version']} ({about['Summary']})" if about["Summary"] else f" {about['Version']}"
