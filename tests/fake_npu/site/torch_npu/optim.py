"""torch_npu.optim: SGD over flat buffers, with the rules of the real one."""

import torch

from torch_npu._calls import note


class NpuFusedSGD(torch.optim.Optimizer):
    """SGD that joins all parameters, all gradients and all momenta of a group into one tensor each at the first step.

    Afterwards it reads its own buffer of gradients: one that was replaced (set to None, or re-pointed into a bucket of
    DistributedDataParallel) is not seen. Where the real one goes on in silence, this one raises.
    """

    is_fused_optimizer = True

    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, defaults)
        self._flat = None
        note("NpuFusedSGD")

    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        for group in self._flat or ():
            group["grads"].zero_()
        if self._flat is None:
            super().zero_grad(set_to_none=False)

    @torch.no_grad()
    def step(self, closure=None):
        if self._flat is None:
            self._flat = [self._join(group) for group in self.param_groups if group["params"]]
        for group, flat in zip((g for g in self.param_groups if g["params"]), self._flat, strict=True):
            for p, pointer in flat["pointers"]:
                if p.grad is None or p.grad.data_ptr() != pointer:
                    raise RuntimeError("NpuFusedSGD: a gradient left the joined buffer; its update would be lost")
            self._update(group, flat)

    def _join(self, group):
        """Flat buffers of a group; its parameters, gradients and momenta become views of them."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if any(p.dtype not in (torch.float32, torch.float16) for p in parameters):
            raise TypeError("Fused optimizer's parameters must be either float32 or float16")
        loaded = all("momentum_buffer" in self.state[p] for p in parameters)
        flat = dict(params=_flatten(parameters), grads=_flatten([p.grad for p in parameters]), first=not loaded)
        flat["momenta"] = (
            _flatten([self.state[p]["momentum_buffer"] for p in parameters])
            if loaded else torch.zeros_like(flat["params"])
        )
        sizes = [p.numel() for p in parameters]
        views = [flat[name].split(sizes) for name in ("params", "grads", "momenta")]
        for p, value, grad, momentum in zip(parameters, *views, strict=True):
            p.data, p.grad = value.view_as(p), grad.view_as(p)
            self.state[p]["momentum_buffer"] = momentum.view_as(p)
        flat["pointers"] = [(p, p.grad.data_ptr()) for p in parameters]
        return flat

    def _update(self, group, flat):
        grads = flat["grads"]
        if group["weight_decay"]:
            grads = grads.add(flat["params"], alpha=group["weight_decay"])
        if group["momentum"]:
            if flat["first"]:
                flat["momenta"].copy_(grads)
            else:
                flat["momenta"].mul_(group["momentum"]).add_(grads, alpha=1 - group["dampening"])
            flat["first"] = False
            grads = grads.add(flat["momenta"], alpha=group["momentum"]) if group["nesterov"] else flat["momenta"]
        flat["params"].add_(grads, alpha=-group["lr"])


def _flatten(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])
