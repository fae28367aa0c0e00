"""Xception (Chollet 2017, arXiv 1610.02357, figure 5).

Input float32 [N, 3, H, W] normalized to [-1, 1], output logits [N, num_classes]; 22,855,952 trainable parameters at
1000 classes. Module names are those of the public PyTorch weights (Cadene, timm `legacy_xception`), which MindSpore's
network shares. Weights exist in two variants of the same layers:

    weights                     pool_padding   bn_eps   reported top-1
    MindSpore model zoo         same           1e-5     79.8
    Keras applications          same           1e-3     79.0
    Cadene / timm               torch          1e-5     79.06 (a port of the Keras weights)

Legend: N batch, C channel, H W pixel.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.layers import Conv2d

MIDDLE_BLOCKS = range(4, 12)


class SamePool(nn.Module):
    """Max-pool 3x3 stride 2 with TensorFlow's and MindSpore's SAME padding: the output side is ceil(side / 2).

    SAME pads an odd side by one pixel at both ends and an even side at its end only, so the windows of an even side
    (74 -> 37 in block2) start one pixel later than with padding=1. ceil_mode lets the last window hang over the end.
    """

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        # int(): an exported graph has fixed sides, and carries the phase as a constant.
        height, width = (int(side) for side in x_NCHW.shape[-2:])
        return F.max_pool2d(x_NCHW, 3, 2, padding=(height % 2, width % 2), ceil_mode=True)


def max_pool(pool_padding: str) -> nn.Module:
    """The down-sampling pool: "same" for MindSpore's and Keras' phase, "torch" for padding=1 on every side.

    Raises:
      ValueError: another word.
    """
    if pool_padding == "same":
        return SamePool()
    if pool_padding == "torch":
        return nn.MaxPool2d(3, 2, padding=1)
    raise ValueError(f"pool_padding: {pool_padding!r}, must be 'same' or 'torch'")


class SeparableConv2d(nn.Module):
    """Depthwise 3x3 convolution, then pointwise 1x1; nothing in between (section 4.7 of the paper)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.conv1(x))


class Block(nn.Module):
    """ReLU -> separable convolution -> batch norm, once per entry of `widths`, plus a shortcut.

    Args:
      in_channels: channels of the input.
      widths: output channels of each separable convolution.
      bn_eps: epsilon of the batch norms.
      pool: module that halves the sides, or None for a block with an identity shortcut.
      leading_relu: False where the input is activated already (block1).
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        bn_eps: float,
        pool: nn.Module | None = None,
        leading_relu: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            # Not in place: the shortcut reads the same tensor before the activation.
            layers += [nn.ReLU(), SeparableConv2d(channels, width), nn.BatchNorm2d(width, eps=bn_eps)]
            channels = width
        self.skip: nn.Conv2d | None = None
        if pool is not None:
            layers.append(pool)
            self.skip = nn.Conv2d(in_channels, channels, 1, stride=2, bias=False)
            self.skipbn = nn.BatchNorm2d(channels, eps=bn_eps)
        self.rep = nn.Sequential(*layers[0 if leading_relu else 1 :])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.skip is None else self.skipbn(self.skip(x))
        return self.rep(x) + shortcut


class Xception(nn.Module):
    """The network; any input from 71x71 pixels up.

    Args:
      num_classes: outputs of `fc`.
      dropout: probability of dropping a feature before `fc`, in training only.
      pool_padding: "same" or "torch", see the table above.
      bn_eps: epsilon of every batch norm.
    """

    def __init__(
        self, num_classes: int = 1000, dropout: float = 0.5, pool_padding: str = "same", bn_eps: float = 1e-5
    ) -> None:
        super().__init__()

        def down(in_channels: int, widths: Sequence[int], **options: Any) -> Block:
            return Block(in_channels, widths, bn_eps, max_pool(pool_padding), **options)

        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(32, eps=bn_eps)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(64, eps=bn_eps)
        self.block1 = down(64, (128, 128), leading_relu=False)
        self.block2 = down(128, (256, 256))
        self.block3 = down(256, (728, 728))
        for index in MIDDLE_BLOCKS:
            self.add_module(f"block{index}", Block(728, (728, 728, 728), bn_eps))
        self.block12 = down(728, (728, 1024))
        self.conv3 = SeparableConv2d(1024, 1536)
        self.bn3 = nn.BatchNorm2d(1536, eps=bn_eps)
        self.conv4 = SeparableConv2d(1536, 2048)
        self.bn4 = nn.BatchNorm2d(2048, eps=bn_eps)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)
        self.apply(_initialize)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x_NCHW)))
        x = F.relu(self.bn2(self.conv2(x)))
        for index in range(1, 13):
            x = self.get_submodule(f"block{index}")(x)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        x_NC = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(self.dropout(x_NC))


def _initialize(module: nn.Module) -> None:
    """The seed's initial values: Xavier-uniform convolutions, MindSpore's default for its dense layer."""
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
