"""Inception v4.

Szegedy, Ioffe, Vanhoucke, Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
2016, https://arxiv.org/abs/1602.07261, section 3 and figures 3 to 9.

Parameter names are those of the public PyTorch weights (Cadene, timm), so their files load as they are. Input
N x 3 x H x W with H, W >= 75, published at 299; output N x 1000 logits, or N x 1001 where column 0 is a background
class. 42,679,816 or 42,681,353 parameters. Reported for the public weights: top-1 80.1 %, top-5 94.9 %.

A unit is conv (no bias), batch norm (eps 1e-3), ReLU. "valid" layers of the paper have no padding, all others keep the
size. The pooling branches average only the pixels that exist: padding is not counted.
"""

import torch
from torch import nn
from torch.nn import functional

from common.layers import BasicConv2d, convolved


def same(in_channels: int, out_channels: int, height: int, width: int) -> BasicConv2d:
    """A unit that keeps the size of the map."""
    return BasicConv2d(in_channels, out_channels, (height, width), padding=(height // 2, width // 2))


class Branch(nn.Sequential):
    """Several parts, one after the other; the first one but Identity is a unit."""

    @property
    def unit(self) -> BasicConv2d:
        return next(module for module in self if isinstance(module, BasicConv2d))

    def forward(self, x: torch.Tensor, convolved: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
          convolved: output of the first unit's convolution where the caller has computed it.
        """
        first, *rest = (module for module in self if not isinstance(module, nn.Identity))
        y = first(x, convolved)
        for module in rest:
            y = module(y)
        return y


def pooled(in_channels: int, out_channels: int) -> Branch:
    """The pooling branch of the A, B and C blocks; in the public names the convolution is the second of two parts."""
    pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return Branch(nn.Identity(), BasicConv2d(in_channels, out_channels, 1, pool=pool))


class Branches(nn.Module):
    """Parallel branches, named as in the public weights; their outputs are concatenated along the channels."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(_outputs(x, list(self.children())), 1)


def _outputs(x: torch.Tensor, branches: list[nn.Module]) -> list[torch.Tensor]:
    """Of branches with the same input."""
    units = [branch.unit if isinstance(branch, Branch) else branch for branch in branches]
    known = convolved(x, [unit if isinstance(unit, BasicConv2d) else None for unit in units])
    return [branch(x) if y is None else branch(x, y) for branch, y in zip(branches, known, strict=True)]


def stem() -> list[nn.Module]:
    """299 -> 35 pixels, 3 -> 384 channels (figure 3)."""
    units = [BasicConv2d(3, 32, 3, stride=2), BasicConv2d(32, 32, 3), same(32, 64, 3, 3)]
    first = Branches(maxpool=nn.MaxPool2d(3, stride=2), conv=BasicConv2d(64, 96, 3, stride=2))
    branch0 = Branch(BasicConv2d(160, 64, 1), BasicConv2d(64, 96, 3))
    branch1 = [BasicConv2d(160, 64, 1), same(64, 64, 1, 7), same(64, 64, 7, 1), BasicConv2d(64, 96, 3)]
    second = Branches(branch0=branch0, branch1=Branch(*branch1))
    return [*units, first, second, Branches(conv=BasicConv2d(192, 192, 3, stride=2), maxpool=nn.MaxPool2d(3, stride=2))]


def inception_a() -> Branches:
    """35 x 35 x 384 block (figure 4)."""
    return Branches(
        branch0=BasicConv2d(384, 96, 1),
        branch1=Branch(BasicConv2d(384, 64, 1), same(64, 96, 3, 3)),
        branch2=Branch(BasicConv2d(384, 64, 1), same(64, 96, 3, 3), same(96, 96, 3, 3)),
        branch3=pooled(384, 96),
    )


def reduction_a() -> Branches:
    """35 -> 17 pixels, 384 -> 1024 channels (figure 7 with k, l, m, n = 192, 224, 256, 384)."""
    branch0 = BasicConv2d(384, 384, 3, stride=2)
    branch1 = Branch(BasicConv2d(384, 192, 1), same(192, 224, 3, 3), BasicConv2d(224, 256, 3, stride=2))
    return Branches(branch0=branch0, branch1=branch1, branch2=nn.MaxPool2d(3, stride=2))


def inception_b() -> Branches:
    """17 x 17 x 1024 block (figure 5)."""
    branch0 = BasicConv2d(1024, 384, 1)
    branch1 = Branch(BasicConv2d(1024, 192, 1), same(192, 224, 1, 7), same(224, 256, 7, 1))
    branch2 = [BasicConv2d(1024, 192, 1), same(192, 192, 7, 1), same(192, 224, 1, 7), same(224, 224, 7, 1)]
    branch2.append(same(224, 256, 1, 7))
    return Branches(branch0=branch0, branch1=branch1, branch2=Branch(*branch2), branch3=pooled(1024, 128))


def reduction_b() -> Branches:
    """17 -> 8 pixels, 1024 -> 1536 channels (figure 8)."""
    branch0 = Branch(BasicConv2d(1024, 192, 1), BasicConv2d(192, 192, 3, stride=2))
    branch1 = [
        BasicConv2d(1024, 256, 1),
        same(256, 256, 1, 7),
        same(256, 320, 7, 1),
        BasicConv2d(320, 320, 3, stride=2),
    ]
    return Branches(branch0=branch0, branch1=Branch(*branch1), branch2=nn.MaxPool2d(3, stride=2))


class InceptionC(nn.Module):
    """8 x 8 x 1536 block; two of its branches fork once more (figure 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch0 = BasicConv2d(1536, 256, 1)
        self.branch1_0 = BasicConv2d(1536, 384, 1)
        self.branch1_1a = same(384, 256, 1, 3)
        self.branch1_1b = same(384, 256, 3, 1)
        self.branch2_0 = BasicConv2d(1536, 384, 1)
        self.branch2_1 = same(384, 448, 3, 1)
        self.branch2_2 = same(448, 512, 1, 3)
        self.branch2_3a = same(512, 256, 1, 3)
        self.branch2_3b = same(512, 256, 3, 1)
        self.branch3 = pooled(1536, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y0, y1, y2, y3 = _outputs(x, [self.branch0, self.branch1_0, self.branch2_0, self.branch3])
        y2 = self.branch2_2(self.branch2_1(y2))
        forks = self.branch1_1a(y1), self.branch1_1b(y1), self.branch2_3a(y2), self.branch2_3b(y2)
        return torch.cat((y0, *forks, y3), 1)


class InceptionV4(nn.Module):
    """The whole network.

    Args:
      num_classes: outputs; 1001 for the public weights as they are (column 0 is the background class).
      dropout: probability of dropping a feature in training; the paper keeps 0.8.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        blocks = [*(inception_a() for _ in range(4)), reduction_a(), *(inception_b() for _ in range(7)), reduction_b()]
        self.features = nn.Sequential(*stem(), *blocks, *(InceptionC() for _ in range(3)))
        self.dropout = nn.Dropout(dropout)
        self.last_linear = nn.Linear(1536, num_classes)
        self.apply(_initialize)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.last_linear(self.dropout(x))


def _initialize(module: nn.Module) -> None:
    """He initialization of the convolutions, Glorot of the classifier: what the paper's own code trains from."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
