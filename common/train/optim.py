"""Optimizers: SGD with momentum, as every published recipe of the zoo uses it, and torch's RMSprop and AdamW."""

import torch
from torch.optim import swa_utils


def make_optimizer(model, config, device):
    """The optimizer of `config.optimizer` over the model's parameters, in one fused kernel where the device has it.

    `config.momentum` is SGD's and RMSprop's momentum and AdamW's first beta. RMSprop has decay 0.9 and
    epsilon 1.0 as in arXiv 1512.00567, section 8 (torch adds epsilon to the root, TensorFlow under it).

    Call after the model is on its device: npu replaces the storage of some weights on the way.

    With `config.decay_norm` off, one-dimensional batch-norm parameters are left out of the weight decay (MindSpore's
    rule: everything but gamma and beta decays, so the classifier's bias does).
    """
    norms = [
        p
        for module in model.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        for p in module.parameters(recurse=False)
    ]
    norm_ids = {id(p) for p in norms}
    others = [p for p in model.parameters() if id(p) not in norm_ids]
    groups = [
        dict(params=others, weight_decay=config.weight_decay),
        dict(params=norms, weight_decay=config.weight_decay if config.decay_norm else 0.0),
    ]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.lr, momentum=config.momentum, alpha=0.9, eps=1.0)
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=device.has_fused_optimizers or None)
    return device.make_sgd(groups, config)


def keeps_gradients(optimizer):
    """Whether an optimizer reads the gradient tensors that it saw first, so that nobody may replace them."""
    return getattr(optimizer, "is_fused_optimizer", False)


def load_state(optimizer, state):
    """Load momentum and rates that were saved on any device; which kernel runs stays this device's choice."""
    groups = [{k: v for k, v in g.items() if k not in ("fused", "foreach")} for g in state["param_groups"]]
    for group, ours in zip(groups, optimizer.param_groups, strict=True):
        group.update((key, ours[key]) for key in ("fused", "foreach") if key in ours)
    optimizer.load_state_dict({**state, "param_groups": groups})


def make_ema(model, decay):
    """An AveragedModel that follows `model`, or None where decay is 0."""
    if not decay:
        return None
    return swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True)
