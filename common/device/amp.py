"""Mixed precision: autocast with a loss scale, or apex. A part of common/device.py."""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import pathlib

import torch

from common.errors import UserError


def autocast(device, amp_type):
    """Autocast context; does nothing where amp_type is None."""
    if amp_type is None:
        return contextlib.nullcontext()
    return torch.autocast(device.kind, torch.float16 if amp_type == "fp16" else torch.bfloat16)


def prepare(model, optimizer, device, amp_type, config):
    """Set up mixed precision for a model that is on its device and not yet wrapped for several ranks.

    Args:
      amp_type: "fp16", "bf16" or None, as Device.amp_type gives it.
      config: TrainConfig with amp_backend, opt_level, loss_scale, combine_grad.
    Returns:
      (model, optimizer, precision): a NativePrecision or ApexPrecision, whose methods the training step calls.
    """
    if config.amp_backend == "native":
        return model, optimizer, NativePrecision(device, amp_type, config.loss_scale)
    return ApexPrecision.initialize(model, optimizer, device, config)


class NativePrecision:
    """torch.autocast, and for fp16 a loss scale, static or dynamic; everything does nothing special when off.

    A step whose gradients overflow is skipped in both modes; a static scale stays what it is.

    Attributes:
      evaluation_type: amp_type for the evaluation of the network.
    """

    def __init__(self, device, amp_type, loss_scale):
        self._device, self.evaluation_type = device, amp_type
        enabled = amp_type == "fp16"
        self._static = None if loss_scale == "dynamic" or not enabled else float(loss_scale)
        initial = 2.0**16 if loss_scale == "dynamic" else float(loss_scale)
        if device.kind == "npu":
            # torch_npu's own scaler: it also sees overflow on chips that saturate instead of producing infinities. Its
            # dynamic=False would not look for overflow at all, so a static scale is set anew after each step instead.
            self._scaler = torch.npu.amp.GradScaler(init_scale=initial, dynamic=True, enabled=enabled)
        else:
            self._scaler = torch.amp.GradScaler(device.kind, init_scale=initial, enabled=enabled)

    def forward(self):
        """Context of forward pass and loss."""
        return autocast(self._device, self.evaluation_type)

    def backward(self, loss, optimizer, is_last):
        """Gradients of a micro-batch's loss; `is_last`: the step follows."""
        self._scaler.scale(loss).backward()

    def unscaled_parameters(self, model, optimizer):
        """The parameters whose gradients the step will use, brought to their true size, for clipping."""
        self._scaler.unscale_(optimizer)
        return model.parameters()

    def step(self, optimizer):
        """Unscale, step unless the gradients overflowed, and adapt a dynamic scale."""
        self._scaler.step(optimizer)
        self._scaler.update(self._static)

    def state_dict(self):
        return self._scaler.state_dict()

    def load_state_dict(self, state):
        """Take over the state of any device's scaler; an empty one (fp16 was off) changes nothing."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict({**self._scaler.state_dict(), **state})


class ApexPrecision:
    """apex's O1 (functions patched to cast) or O2 (fp16 weights beside float32 masters), Ascend's or NVIDIA's.

    With a static scale apex makes every step, overflow or not; a dynamic one skips those that overflow.
    """

    evaluation_type = None  # apex has patched the network or torch's functions; autocast would cast once more

    def __init__(self, amp):
        self._amp = amp

    @classmethod
    def initialize(cls, model, optimizer, device, config):
        """(model, optimizer, precision), patched by apex; arguments as those of `prepare`."""
        amp = _import_apex(device, config)
        more = {"combine_grad": True} if config.combine_grad else {}
        scale = config.loss_scale if config.loss_scale == "dynamic" else float(config.loss_scale)
        model, optimizer = amp.initialize(
            model, optimizer, opt_level=config.opt_level or "O2", loss_scale=scale, verbosity=0, **more
        )
        return model, optimizer, cls(amp)

    def forward(self):
        """Context of forward pass and loss."""
        return contextlib.nullcontext()

    def backward(self, loss, optimizer, is_last):
        """Gradients of a micro-batch's loss; apex brings them to their true size with the last one of a step."""
        with self._amp.scale_loss(loss, optimizer, delay_unscale=not is_last) as scaled:
            scaled.backward()

    def unscaled_parameters(self, model, optimizer):
        """The parameters whose gradients the step will use, for clipping: O2's float32 masters."""
        return list(self._amp.master_params(optimizer))

    def step(self, optimizer):
        """Step; apex has replaced it by nothing where a dynamic scale overflowed."""
        optimizer.step()

    def state_dict(self):
        return self._amp.state_dict()

    def load_state_dict(self, state):
        """Take over apex's state; that of native autocast has none of its entries."""
        if "loss_scaler0" in state:
            self._amp.load_state_dict(state)


def check_apex(device, config):
    """Raise UserError where --amp-backend apex cannot work: device, options, package."""
    if device.kind == "cpu":
        raise UserError("--amp-backend: apex is for npu and cuda; leave it out on cpu")
    _import_apex(device, config)


_WHERE = {"npu": "Ascend's (gitcode.com/ascend/apex)", "cuda": "NVIDIA's (github.com/NVIDIA/apex)"}


def _import_apex(device, config):
    """The module apex.amp.

    Raises:
      UserError: apex is not there, is PyPI's unrelated package, does not load, or lacks what was asked for.
    """
    remedy = f"install {_WHERE[device.kind]}, or use --amp-backend native"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise UserError(f"--amp-backend: apex is not installed; {remedy}")
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "amp").is_dir() or (folder / "amp.py").is_file() for folder in folders):
        raise UserError(
            f"--amp-backend: the installed package apex{_described('apex')} is PyPI's, which has nothing to do with "
            f"mixed precision (no apex.amp); `pip uninstall apex`, then {remedy}"
        )
    try:
        from apex import amp
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--amp-backend: apex does not load ({reason}); {remedy}") from error
    if config.combine_grad and "combine_grad" not in inspect.signature(amp.initialize).parameters:
        raise UserError("--combine-grad: this apex has no combine_grad (Ascend's has); leave it out")
    return amp


def _described(package):
    """Version and summary of an installed package in brackets, or an empty string."""
    try:
        about = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f" {about['Version']} ({about['Summary']})" if about["Summary"] else f" {about['Version']}"
