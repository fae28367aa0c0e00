"""Scaled channels: which channels are scaled, by what, and that the logits stay."""

import io

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from common.deploy import channel_scales, export, int8_graph
from common.evaluation import engines
from tools import models

SIDE = 16


class Branches(nn.Module):
    """Readers of all kinds: pool, Concat, depthwise convolution, residual sum, convolution with padding, classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.inner, self.summed, self.last = nn.Conv2d(10, 10, 1), nn.Conv2d(10, 10, 3, padding=1), nn.Conv2d(10, 12, 1)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x = torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        x = nn.functional.max_pool2d(x, 3, 2)
        x = torch.relu(self.inner(x))
        x = torch.relu(self.last(x + torch.relu(self.summed(x))))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def graph_of(network, side):
    buffer = io.BytesIO()
    options = dict(dynamo=False, opset_version=13, input_names=["image"], dynamic_axes={"image": {0: "batch"}})
    torch.onnx.export(network.eval(), torch.zeros(1, 3, side, side), buffer, **options)
    return int8_graph.prepare(int8_graph.raised(onnx.load_from_string(buffer.getvalue())))


@pytest.fixture(scope="module")
def branches():
    torch.manual_seed(0)
    network = Branches()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= torch.logspace(0, -3, len(module.weight)).view(-1, 1, 1, 1)  # unequal ranges
                module.bias.fill_(0.01)
    return graph_of(network, SIDE), np.random.default_rng(0).normal(size=(2, 1, 3, SIDE, SIDE)).astype(np.float32)


def run(proto, images, names=()):
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = {value.name: value for value in copy.graph.value_info}
    copy.graph.output.extend(known[name] for name in names)
    session = engines.cpu_session(copy)
    return session.run(None, {session.get_inputs()[0].name: images})


def test_the_logits_stay_and_the_ranges_become_more_equal(branches):
    proto, images = branches
    channels = channel_scales.Channels(proto)
    factors = channels.factors(lambda i: images[i], len(images))
    scaled = channel_scales.scaled(proto, factors)
    names = list(factors)
    for name, values in zip(names, run(proto, np.concatenate(images), names)[1:], strict=True):
        before = values.max((0, 2, 3))
        after = before * factors[name]
        assert after.max() / after[after > 0].min() < before.max() / before[before > 0].min()
    for image in images:
        before, after = run(proto, image, names), run(scaled, image, names)
        np.testing.assert_allclose(after[0], before[0], rtol=1e-4, atol=1e-6)
        for name, plain, found in zip(names, before[1:], after[1:], strict=True):
            np.testing.assert_allclose(found, plain * factors[name].reshape(1, -1, 1, 1), rtol=1e-4, atol=1e-6)
    weights = {tensor.name for tensor in scaled.graph.initializer}
    assert weights == {name for node in scaled.graph.node for name in node.input} & weights  # no old ones are left


def test_channels_whose_values_a_sum_needs_are_left_as_they_are(branches):
    """`inner` and `summed` are added; `last` and those before are scaled, the branches of the Concat together."""
    channels = channel_scales.Channels(branches[0])
    convs = {name: conv.name.strip("/").split("/")[0] for name, conv in channels.convs.items()}
    assert sorted(convs.values()) == ["a", "b", "depthwise", "last", "stem"]
    groups = sorted(sorted(convs[name] for name in group) for group in channels.groups())
    assert groups == [["a", "b"], ["depthwise"], ["last"], ["stem"]]


def test_factors_of_ranges_known_in_advance():
    """Largest values 16, 1, 0: the share 1/16 to the power -0.75 is 8; a channel without values gets the largest."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1))
    network.append(nn.Flatten())
    with torch.no_grad():
        network[0].weight.copy_(torch.diag(torch.tensor([16.0, 1.0, -1.0]))[:, :, None, None])
    channels = channel_scales.Channels(graph_of(network, 4))
    images = [np.full((2, 3, 4, 4), value, np.float32) for value in (0.5, 1)]
    (factors,) = channels.factors(lambda i: images[i], 2).values()
    np.testing.assert_allclose(factors, [1, 8, 64])


@pytest.mark.parametrize(("name", "count"), [("inception_v3", 94), ("inception_v4", 149), ("xception", 24)])
def test_the_channels_of_the_networks(name, count, tmp_path):
    spec = models.spec(name)
    torch.manual_seed(0)
    network = spec.build(num_classes=5).eval()
    export.export_onnx(network, spec, tmp_path / "net.onnx", 75, classes=None)
    proto = int8_graph.prepare(int8_graph.raised(onnx.load(tmp_path / "net.onnx")))
    images = np.random.default_rng(0).normal(size=(2, 3, 75, 75)).astype(np.float32)
    channels = channel_scales.Channels(proto)
    assert len(channels.convs) == count
    scaled = channel_scales.scaled(proto, channels.factors(lambda i: images, 1))
    (before,), (after,) = run(proto, images), run(scaled, images)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
