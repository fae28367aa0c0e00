"""Layers that several networks share."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from common import cpuinfo


@functools.cache
def _products_are_fast(is_bfloat16: bool) -> bool:
    """Whether matrix products have the rate of convolutions or more: in float32 MKL's on Intel's processors only.

    On an AMD EPYC MKL reaches 0.6 to 0.9 of the rate of oneDNN's convolutions. Products in bfloat16 are oneDNN's.
    """
    return is_bfloat16 or cpuinfo.field("vendor_id") == "GenuineIntel"


class Conv2d(nn.Conv2d):
    """nn.Conv2d, trained faster on CPUs where it is one matrix product and such products are fast.

    That is a 1x1 kernel with stride 1, or a kernel as large as the input. There, oneDNN's gradients in channels_last
    reach half to four fifths of the rate of the matrix product in float32, its forward pass about the same rate. In
    bfloat16 both have one rate, but the product can be shared by several units (`convolved`).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.trains_by_product(x):
            return super().forward(x)
        kernel = self.weight.permute(0, 2, 3, 1).flatten(1)
        rows = x.permute(0, 2, 3, 1).reshape(-1, kernel.shape[1])  # the pixels of a window, adjacent in memory
        sides = (x.shape[2] // self.kernel_size[0], x.shape[3] // self.kernel_size[1])
        return F.linear(rows, kernel, self.bias).view(len(x), *sides, self.out_channels).permute(0, 3, 1, 2)

    def trains_by_product(self, x: torch.Tensor) -> bool:
        """Whether the output for x is computed by one matrix product."""
        return (
            self.training
            and type(x) is torch.Tensor  # no tracer's stand-in
            and (self.kernel_size == self.stride == (1, 1) or self.kernel_size == x.shape[2:])
            and self.padding == (0, 0)
            and self.groups == 1
            and x.device.type == "cpu"
            and _products_are_fast(torch.is_autocast_enabled("cpu"))
            and torch.is_grad_enabled()
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
        self.conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.pool = pool

    def forward(self, x: torch.Tensor, convolved: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
          convolved: what `convolved` computed for this unit.
        """
        pools_last = self.training and torch.is_grad_enabled()
        if self.pool is not None and not pools_last:
            x = self.pool(x)
        y = self.conv(x) if convolved is None else convolved
        if self.pool is not None and pools_last:
            y = self.pool(y)
        return F.relu(self.bn(y), inplace=True)


def convolved(x: torch.Tensor, units: Sequence[BasicConv2d | None]) -> list[torch.Tensor | None]:
    """Outputs of 1x1 convolutions of the same input in a training step on a CPU, by one matrix product.

    One product with many columns is faster than several, and the gradient of the input needs no sum.

    Returns:
      the output of `unit.conv` for each unit; None where it is to be computed alone.
    """
    convs = [
        unit.conv
        if unit and unit.training and unit.conv.kernel_size == (1, 1) and unit.conv.trains_by_product(x)
        else None
        for unit in units
    ]
    merged = [conv for conv in convs if conv]
    if len(merged) < 2:
        return [None] * len(units)
    # permute: the gradients get the strides of the weights, as DistributedDataParallel expects
    kernel = torch.cat([conv.weight.permute(0, 2, 3, 1).flatten(1) for conv in merged])
    parts = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), kernel).split([len(conv.weight) for conv in merged], 1)
    maps = (part.contiguous().view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2) for part in parts)
    return [next(maps) if conv else None for conv in convs]
