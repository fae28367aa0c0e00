"""SGD with momentum, as every recipe of the zoo uses it."""

import torch


def make_sgd(model, config, device):
    """SGD over the model's parameters, in one fused kernel where the device has it.

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
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=device.has_fused_sgd or None)
