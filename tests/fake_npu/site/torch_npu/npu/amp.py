"""torch.npu.amp: the loss scaler."""

import torch
from torch.amp.grad_scaler import OptState

from torch_npu._calls import note


class GradScaler(torch.amp.GradScaler):
    """PyTorch's scaler with torch_npu's differences: `dynamic`, no device argument, npu tensors only.

    With dynamic=False the scale stays and no gradient is looked at: a step with infinite gradients is made.
    """

    def __init__(
        self,
        init_scale=2.0**16,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=2000,
        dynamic=True,
        enabled=True,
    ):
        super().__init__("npu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._dynamic = dynamic
        if enabled:
            note("GradScaler", f"init_scale={init_scale:g}", f"dynamic={dynamic}")

    def scale(self, outputs):
        if self._enabled and outputs.device.type != "npu":
            raise ValueError("Device type of outputs should be npu.")
        return super().scale(outputs)

    def unscale_(self, optimizer):
        """PyTorch's, without the float64 in which it computes the reciprocal."""
        if not self._enabled:
            return
        self._check_scale_growth_tracker("unscale_")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY:
            raise RuntimeError("unscale_() is called once, before step()")
        found = torch.zeros((), device=self._scale.device)
        state["found_inf_per_device"] = self._unscale_grads_(optimizer, self._scale.reciprocal(), found, False)
        state["stage"] = OptState.UNSCALED

    def _maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs):
        overflow = any(value.item() for value in optimizer_state["found_inf_per_device"].values())
        if overflow and self._dynamic:
            print("Gradient overflow. Skipping step")
            note("skipped step")
            return None
        return optimizer.step(*args, **kwargs)

    def update(self, new_scale=None):
        if self._enabled and not self._dynamic and new_scale is None:
            new_scale = self.get_scale()
        super().update(new_scale)

    def state_dict(self):
        return {**super().state_dict(), "dynamic": self._dynamic} if self._enabled else {}

    def load_state_dict(self, state_dict):
        if self._enabled:
            super().load_state_dict(state_dict)
            self._dynamic = state_dict["dynamic"]
