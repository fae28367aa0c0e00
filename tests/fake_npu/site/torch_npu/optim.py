"""torch_npu.optim: SGD over flat buffers, with the restrictions of the real one."""

import torch

from torch_npu._calls import note


class NpuFusedSGD(torch.optim.Optimizer):
    """SGD that moves all parameters, gradients and momenta of a group into one flat tensor each at the first step.

    From then on it reads its own gradient buffer and misses a gradient that was replaced (set to None, or made a view
    of a DistributedDataParallel bucket). The real one ignores that silently, this one raises.
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
            for p, grad, momentum in flat["views"]:
                if p.grad is None or p.grad.data_ptr() != grad.data_ptr():
                    raise RuntimeError("NpuFusedSGD: a gradient left the joined buffer; its update would be lost")
                self._update(group, p, grad, momentum, flat["first"])
            flat["first"] = False

    def _join(self, group):
        """Flat buffers of a group; its parameters, gradients and momenta become views of them."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if any(p.dtype not in (torch.float32, torch.float16) for p in parameters):
            raise TypeError("Fused optimizer's parameters must be either float32 or float16")
        loaded = all("momentum_buffer" in self.state[p] for p in parameters)
        flat = dict(params=_flatten(parameters), grads=_flatten([p.grad for p in parameters]), views=[])
        flat["momenta"] = (
            _flatten([self.state[p]["momentum_buffer"] for p in parameters])
            if loaded
            else torch.zeros_like(flat["params"])
        )
        flat["first"] = not loaded
        sizes = [_padded(p) for p in parameters]
        parts = [flat[name].split(sizes) for name in ("params", "grads", "momenta")]
        for p, *buffers in zip(parameters, *parts, strict=True):
            p.data, p.grad, momentum = (part[: p.numel()].view_as(p) for part in buffers)
            self.state[p]["momentum_buffer"] = momentum
            flat["views"].append((p, p.grad, momentum))
        return flat

    def _update(self, group, p, grad, momentum, is_first):
        # torch.optim.SGD's kernel on the CPU, one parameter at a time: another order of operations rounds differently
        names = ("weight_decay", "momentum", "lr", "dampening", "nesterov")
        torch._fused_sgd_(
            [p],
            [grad],
            [momentum] if group["momentum"] else [],
            **{name: group[name] for name in names},
            maximize=False,
            is_first_step=is_first,
        )


def _padded(tensor):
    """Elements of a tensor in a flat buffer, rounded up so that each tensor begins at a multiple of 64 bytes.

    Separate tensors are aligned so, and the last bits of the CPU's matrix products depend on the alignment.
    """
    return -(-tensor.numel() // 32) * 32


def _flatten(tensors):
    if not all(t.is_contiguous() for t in tensors):
        raise RuntimeError("Tensors to combine must be contiguous.")
    return torch.cat([torch.nn.functional.pad(t.detach().reshape(-1), (0, _padded(t) - t.numel())) for t in tensors])
