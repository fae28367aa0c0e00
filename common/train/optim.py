"""Optimizers (every published recipe uses SGD with momentum; torch's RMSprop and AdamW) and weight averaging."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from common.config import TrainConfig
from common.device.device import Device, eager


def make_optimizer(
    model: nn.Module, config: TrainConfig, device: Device, classifiers: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer of `config.optimizer`, in one fused kernel where the device has it.

    Call it after the model is on its device: npu replaces the storage of some weights on the way.

    `config.momentum` is SGD's and RMSprop's momentum and AdamW's first beta. RMSprop has decay 0.9 and epsilon 1.0 as
    in arXiv 1512.00567, section 8 (torch adds epsilon to the root, TensorFlow under it). With `config.decay_norm` off,
    batch-norm parameters get no weight decay, everything else does, biases included (MindSpore's rule).
    Parameters that need no gradient (--freeze) are left out. With `config.head_lr_scale`, the layers named in
    `classifiers` are a third group with an "lr_scale", by which the training step multiplies its learning rate.
    """
    norms = [
        p
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for p in module.parameters(recurse=False)
        if p.requires_grad
    ]
    modules = dict(model.named_modules())
    heads = [p for name in classifiers if name in modules for p in modules[name].parameters() if p.requires_grad]
    heads = heads if config.head_lr_scale != 1 else []
    others = {id(p) for p in norms + heads}
    body = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    groups: list[dict[str, Any]] = [
        dict(params=body, weight_decay=config.weight_decay),
        dict(params=norms, weight_decay=config.weight_decay if config.decay_norm else 0.0),
    ]
    if heads:
        groups.append(dict(params=heads, weight_decay=config.weight_decay, lr_scale=config.head_lr_scale))
    if config.optimizer == "rmsprop":
        return eager(torch.optim.RMSprop)(groups, lr=config.lr, momentum=config.momentum, alpha=0.9, eps=1.0)
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        return eager(torch.optim.AdamW)(groups, lr=config.lr, betas=betas, fused=device.has_fused_optimizers or None)
    return device.make_sgd(groups, config)


def keeps_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer holds on to the gradient tensors of its first step, so that they must not be replaced."""
    return getattr(optimizer, "is_fused_optimizer", False)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict that was saved on any device.

    Weight decay, momentum and the kernels stay those that the optimizer was made with: of the options of this run, and
    of this device.
    """
    groups = [
        {**saved, **{name: value for name, value in ours.items() if name != "params"}}
        for saved, ours in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    if isinstance(optimizer, torch.optim.RMSprop) and optimizer.param_groups[0]["momentum"]:
        for parameter, values in optimizer.state.items():  # there is none where --momentum was 0 before
            values.setdefault("momentum_buffer", torch.zeros_like(parameter))


def make_ema(model: nn.Module, decay: float) -> swa_utils.AveragedModel | None:
    """An AveragedModel over parameters and buffers of `model`, counters excepted, or None where decay is 0."""
    if not decay:
        return None
    average_floats = swa_utils.get_ema_multi_avg_fn(decay)

    def average(averaged: Any, current: Any, num_averaged: Any) -> None:
        if averaged[0].is_floating_point():
            average_floats(averaged, current, num_averaged)
        else:  # counters of batch norm, whose averages would be rounded down to the first value
            torch._foreach_copy_(averaged, current)

    return swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
