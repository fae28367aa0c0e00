"""Layers that several networks share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class _ConvByMatrixProduct(torch.autograd.Function):
    """F.conv2d whose gradients are matrix products: every pixel of the input is in one window at most.

    Tensors are channels_last, so that the pixels of a window are a row in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, stride=stride)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        outputs, kernel = weight.shape[0], weight.permute(0, 2, 3, 1)
        grad_rows, weight_rows = grads[0].permute(0, 2, 3, 1).reshape(-1, outputs), kernel.reshape(outputs, -1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight_rows).view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            x_rows = x.permute(0, 2, 3, 1).reshape(-1, weight_rows.shape[1])
            grad_weight = (grad_rows.t() @ x_rows).view(kernel.shape).permute(0, 3, 1, 2)
        return grad_x, grad_weight, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d without bias, trained faster on CPUs where a gradient is one matrix product.

    That is a 1x1 kernel with stride 1, or a kernel as large as the input. There, oneDNN's gradients in channels_last
    reach half to four fifths of the rate of the matrix product.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._gradient_is_product(x):
            return _ConvByMatrixProduct.apply(x, self.weight, self.stride)
        return super().forward(x)

    def _gradient_is_product(self, x: torch.Tensor) -> bool:
        return (
            (self.kernel_size == self.stride == (1, 1) or self.kernel_size == x.shape[2:])
            and self.padding == (0, 0)
            and x.device.type == "cpu"
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous()  # a single pixel is in both layouts
        )


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm with eps 1e-3, ReLU.

    The parameter names `conv.weight` and `bn.*` are those of the public weights.

    Args:
      pool: average of the input, stride 1, before a 1x1 convolution. In a training step it follows the convolution,
        where it has fewer channels; both orders compute the same. Elsewhere it comes first, as published: converters
        fold a batch norm into a convolution directly before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
        pool: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is None:
            y = self.conv(x)
        elif self.training and torch.is_grad_enabled():
            y = self.pool(self.conv(x))
        else:
            y = self.conv(self.pool(x))
        return F.relu(self.bn(y), inplace=True)
