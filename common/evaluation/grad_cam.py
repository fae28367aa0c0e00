"""Grad-CAM: which parts of an image raise the logit of a class (Selvaraju et al., https://arxiv.org/abs/1610.02391)."""

from typing import Any

import numpy as np
import torch
from torch import nn


def heat_map(model: nn.Module, images_1CHW: torch.Tensor, column: int) -> np.ndarray:
    """Grad-CAM of one normalized image at the last feature map of more than one position.

    Args:
      column: of the logits.
    Returns:
      float32 [h, w] in [0, 1], the resolution of the feature map; zeros where nothing raises the logit.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
            found[:] = [(output, output.detach().clone())]  # an activation in place may follow

    model.eval()
    hooks = [module.register_forward_hook(keep) for module in model.modules() if module is not model]
    try:
        with torch.enable_grad():
            logit = model(images_1CHW.detach().requires_grad_(True))[0, column]
            output, values = found[0]
            (gradient,) = torch.autograd.grad(logit, output)
    finally:
        for hook in hooks:
            hook.remove()
    weights_C11 = gradient[0].mean(dim=(1, 2), keepdim=True)
    heat = torch.relu((weights_C11 * values[0]).sum(0)).float().cpu().numpy()
    return heat / heat.max() if heat.max() > 0 else heat
