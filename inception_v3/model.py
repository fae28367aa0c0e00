"""Inception v3 (Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, 2015).

Parameter names are torchvision's, so its weights and those of the Ascend model zoo load as they are. Input RGB
[N, 3, H, W] from 75 pixels up, 299 in the paper; output logits [N, K], in training mode (logits, auxiliary logits).
27,161,264 parameters for 1000 classes, 23,834,568 without the auxiliary head. Batch-norm eps is 1e-3. The average
pools of the branches count the padding as zeros (torchvision, timm) or leave it out (TensorFlow, Keras, MindSpore):
`pool_padding`.

Reported: 78.12 % top-1 after 240 epochs on 8 Ascend 910 (resize 342, crop 299); the weights ported from TensorFlow
give 77.29 % and expect 0.5/0.5 normalization (`transform_input`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common.layers import BasicConv2d, convolved
from common.spec import IMAGENET

AUX_GRID = 5  # the auxiliary head's 5x5 convolution needs a map of this side


Pool = Callable[[torch.Tensor], torch.Tensor]


def average_pool(pool_padding: str) -> Pool:
    """The 3x3 average of the branches: "torch" counts the padding as zeros, "same" leaves it out.

    Raises:
      ValueError: another word.
    """
    if pool_padding not in ("torch", "same"):
        raise ValueError(f"pool_padding: {pool_padding!r}, must be 'torch' or 'same'")
    counted = pool_padding == "torch"
    return functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=counted)


def _maximum(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=2)


class Branches(nn.Module):
    """Parallel branches whose outputs are concatenated along the channels.

    Args:
      in_channels: channels of the input.
      branches: each a list of steps: (name, out_channels, kernel_size[, stride, pool]) is a convolution of what `pool`
        gives, padded to keep the size unless it has a stride; a function pools; a list of two convolutions is a fork,
        concatenated.
    """

    def __init__(self, in_channels: int, *branches: list[Any]) -> None:
        super().__init__()
        self.paths: list[list[Any]] = []
        self.out_channels = 0
        for steps in branches:
            path: list[Any] = []
            channels = in_channels
            for step in steps:
                if isinstance(step, list):
                    path.append([self._add(channels, *fork) for fork in step])
                    channels = sum(fork[1] for fork in step)
                elif isinstance(step, tuple):
                    path.append(self._add(channels, *step))
                    channels = step[1]
                else:
                    path.append(step)
            self.paths.append(path)
            self.out_channels += channels

    def _add(
        self,
        in_channels: int,
        name: str,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        pool: Pool | None = None,
    ) -> str:
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = (height // 2, width // 2) if stride == 1 else 0
        self.add_module(name, BasicConv2d(in_channels, out_channels, (height, width), stride, padding, pool))
        return name

    def _step(self, step: Any, x: torch.Tensor) -> torch.Tensor:
        if isinstance(step, list):
            return torch.cat([self._step(fork, x) for fork in step], 1)
        return getattr(self, step)(x) if isinstance(step, str) else step(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        units = [getattr(self, path[0]) if isinstance(path[0], str) else None for path in self.paths]
        outputs = []
        for (first, *rest), unit, known in zip(self.paths, units, convolved(x, units), strict=True):
            y = unit(x, known) if unit else first(x)
            for step in rest:
                y = self._step(step, y)
            outputs.append(y)
        return torch.cat(outputs, 1)


def _grid_35(in_channels: int, pool_channels: int, average: Pool) -> Branches:
    """Figure 5 of the paper: 35x35, a 5x5 and a double 3x3 branch."""
    return Branches(
        in_channels,
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [("branch_pool", pool_channels, 1, 1, average)],
    )


def _reduce_to_17(in_channels: int) -> Branches:
    """Figure 10: 35x35 -> 17x17."""
    return Branches(
        in_channels,
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        [_maximum],
    )


def _grid_17(in_channels: int, c: int, average: Pool) -> Branches:
    """Figure 6 with n = 7: 17x17, `c` channels inside the factorized 7x7 branches."""
    return Branches(
        in_channels,
        [("branch1x1", 192, 1)],
        [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [
            ("branch7x7dbl_1", c, 1),
            ("branch7x7dbl_2", c, (7, 1)),
            ("branch7x7dbl_3", c, (1, 7)),
            ("branch7x7dbl_4", c, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        [("branch_pool", 192, 1, 1, average)],
    )


def _reduce_to_8(in_channels: int) -> Branches:
    """17x17 -> 8x8."""
    return Branches(
        in_channels,
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        [_maximum],
    )


def _grid_8(in_channels: int, average: Pool) -> Branches:
    """Figure 7: 8x8, branches that fork at their end."""
    return Branches(
        in_channels,
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
        ],
        [("branch_pool", 192, 1, 1, average)],
    )


class AuxiliaryHead(nn.Module):
    """Classifier on the 17x17 map, used in training only."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv0 = BasicConv2d(in_channels, 128, 1)
        self.conv1 = BasicConv2d(128, 768, AUX_GRID)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # 17x17 -> 5x5 as published; a map too small for that (inputs below 299) is brought to 5x5 instead.
        if min(x.shape[-2:]) >= 17:
            x = F.avg_pool2d(x, kernel_size=5, stride=3)
        else:
            x = F.adaptive_avg_pool2d(x, AUX_GRID)
        x = self.conv1(self.conv0(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InceptionV3(nn.Module):
    """The network; one attribute for each block, named as in the public weights.

    Args:
      num_classes: outputs K.
      aux: with the auxiliary head, whose logits come second in training mode.
      transform_input: expect ImageNet-normalized input and convert it to 0.5/0.5 first, for weights that were trained
        on the latter (those ported from TensorFlow).
      dropout: probability of dropping a feature before the classifier.
      pool_padding: see `average_pool`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux: bool = True,
        transform_input: bool = False,
        dropout: float = 0.5,
        pool_padding: str = "torch",
    ) -> None:
        super().__init__()
        average = average_pool(pool_padding)
        self.transform_input = transform_input
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = _grid_35(192, 32, average)
        self.Mixed_5c = _grid_35(256, 64, average)
        self.Mixed_5d = _grid_35(288, 64, average)
        self.Mixed_6a = _reduce_to_17(288)
        self.Mixed_6b = _grid_17(768, 128, average)
        self.Mixed_6c = _grid_17(768, 160, average)
        self.Mixed_6d = _grid_17(768, 160, average)
        self.Mixed_6e = _grid_17(768, 192, average)
        self.AuxLogits = AuxiliaryHead(768, num_classes) if aux else None
        self.Mixed_7a = _reduce_to_8(768)
        self.Mixed_7b = _grid_8(1280, average)
        self.Mixed_7c = _grid_8(2048, average)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        """Normal with sigma 0.1, cut at two sigma, in every convolution and linear layer; in the auxiliary head 0.01
        for its 5x5 convolution and 0.001 for its classifier. (The reference sets these as attributes of the wrapper
        modules, where its initializer does not find the first.)"""
        sigma: dict[nn.Module, float] = (
            {self.AuxLogits.conv1.conv: 0.01, self.AuxLogits.fc: 0.001} if self.AuxLogits else {}
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                std = sigma.get(module, 0.1)
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _convert_input(self, x: torch.Tensor) -> torch.Tensor:
        """From (x - mean) / std of ImageNet to (x - 0.5) / 0.5, channel by channel."""
        mean, std = IMAGENET
        scale = x.new_tensor([each / 0.5 for each in std]).view(1, 3, 1, 1)
        shift = x.new_tensor([(each - 0.5) / 0.5 for each in mean]).view(1, 3, 1, 1)
        return x * scale + shift

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if self.transform_input:
            x = self._convert_input(x)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_3b_1x1(_maximum(x))
        x = _maximum(self.Conv2d_4a_3x3(x))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        aux_logits = self.AuxLogits(x) if self.training and self.AuxLogits is not None else None
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits = self.fc(self.dropout(x))
        return logits if aux_logits is None else (logits, aux_logits)
