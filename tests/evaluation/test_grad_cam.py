"""common/evaluation/grad_cam.py: the heat map of a network of two channels, by hand."""

import numpy as np
import torch
from torch import nn

from common.evaluation.grad_cam import heat_map


class Net(nn.Module):
    """Two maps, the image's red plane and its negative; logits [4 a - b, -a], a and b their means."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Conv2d(3, 2, 1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.maps.weight.copy_(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).view(2, 3, 1, 1))
            self.fc.weight.copy_(torch.tensor([[4.0, -1.0], [-1.0, 0.0]]))

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.maps(x)), 1))


def test_heat_by_hand():
    """Of the first logit, the gradient is 4/4 at each position of the first map and -1/4 of the second: 1.25 x red."""
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0] = torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    model = Net().train()
    np.testing.assert_allclose(heat_map(model, image, 0), [[0.25, 0.5], [0, 1]])  # as a share of the largest
    np.testing.assert_allclose(heat_map(model, image, 1), [[0, 0], [1, 0]])
    assert not model.training and not model.maps._forward_hooks
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # frozen blocks
    np.testing.assert_allclose(heat_map(model, image, 0), [[0.25, 0.5], [0, 1]])


def test_nothing_raises_the_logit():
    image = torch.full((1, 3, 2, 2), -1.0)
    assert heat_map(Net(), image, 0).tolist() == [[0, 0], [0, 0]]
