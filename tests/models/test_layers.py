"""The shared layers compute what torch's layers compute, forward and backward, in every mode that trains them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common import layers
from common.evaluation import onnx_conversion
from tools import models

NEEDS = {"both": (True, True), "weight": (False, True), "input": (True, False)}


ARE_FAST = layers._products_are_fast.__wrapped__


@pytest.fixture(autouse=True)
def _on_a_processor_with_fast_products(monkeypatch):
    monkeypatch.setattr(layers, "_products_are_fast", lambda is_bfloat16: True)


@pytest.fixture
def products(monkeypatch):
    """Shapes of what is computed by matrix products."""
    shapes, linear = [], F.linear

    def counted(rows, *parameters):
        shapes.append(tuple(rows.shape))
        return linear(rows, *parameters)

    monkeypatch.setattr(layers.F, "linear", counted)
    return shapes


def gradients(conv, x, forward=None):
    """(output, gradients of the input, the weight and the bias) for an output gradient that differs in every element."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    conv.zero_grad()
    y = (forward or conv)(x)
    y.backward(torch.arange(y.numel()).sub(y.numel() // 2).view_as(y).to(y.dtype))
    return y.detach(), x.grad, *(parameter.grad for parameter in conv.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "shape", "is_product"),
    [
        (1, 1, 0, (3, 5, 4, 6), True),
        (1, 1, 0, (2, 5, 1, 1), False),  # in both layouts
        (5, 1, 0, (3, 5, 5, 5), True),
        ((3, 2), 2, 0, (2, 5, 3, 2), True),
        (1, 2, 0, (3, 5, 4, 6), False),
        (1, 1, 1, (3, 5, 4, 6), False),
        (3, 1, 1, (3, 5, 3, 3), False),
        (3, 1, 0, (3, 5, 4, 3), False),
    ],
)
def test_gradients_are_those_of_torch(kernel, stride, padding, shape, is_product, needs, bias, products):
    """Bit for bit: on small integers every sum is exact, in whatever order it is computed."""
    torch.manual_seed(0)
    conv = layers.Conv2d(5, 7, kernel, stride, padding, bias=bias).to(memory_format=torch.channels_last)
    for parameter in conv.parameters():
        nn.init.normal_(parameter, std=3).data.round_()
    x = torch.randn(shape).mul(3).round().to(memory_format=torch.channels_last)
    x.requires_grad, conv.weight.requires_grad = NEEDS[needs]
    expected = gradients(conv, x, lambda x: F.conv2d(x, conv.weight, conv.bias, stride, padding))
    for ours, theirs in zip(gradients(conv, x), expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
            assert ours.stride() == theirs.stride() or 1 in ours.shape
    assert bool(products) == is_product


def test_groups_take_torchs_way(products):
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    conv = layers.Conv2d(4, 4, 1, groups=2).to(memory_format=torch.channels_last)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, groups=2))
    assert not products


def test_other_layouts_take_torchs_way(products):
    gradients(layers.Conv2d(16, 16, 1), torch.randn(2, 16, 3, 4, requires_grad=True))
    assert not products


@pytest.mark.parametrize("merged", [False, True])
def test_bf16_autocast_computes_products(merged, products):
    """Bit for bit on small integers, whose float32 sums are exact; the gradients stay float32."""
    torch.manual_seed(0)
    units = [layers.BasicConv2d(16, n, 1).to(memory_format=torch.channels_last) for n in (8, 4)]
    convs = [unit.conv for unit in units]
    for conv in convs:
        nn.init.normal_(conv.weight).data.round_()
    x = torch.randn(2, 16, 3, 4).round().to(memory_format=torch.channels_last)
    results = []
    for forward in (lambda x: [F.conv2d(x, conv.weight) for conv in convs], None):
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if forward:
                outputs = forward(given)
            else:
                outputs = layers.convolved(given, units) if merged else [conv(given) for conv in convs]
        assert all(y.dtype == torch.bfloat16 for y in outputs)
        for conv in convs:
            conv.zero_grad()
        sum((y * torch.arange(-2, 2)).sum() for y in outputs).backward()
        results.append([*outputs, given.grad, *(conv.weight.grad for conv in convs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert len(products) == (1 if merged else 2)


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD", ""])
def test_in_float32_products_are_computed_on_intels_processors(vendor, products, monkeypatch):
    monkeypatch.setattr(layers.cpuinfo, "field", {"vendor_id": vendor}.get)
    monkeypatch.setattr(layers, "_products_are_fast", ARE_FAST)
    units = [layers.BasicConv2d(16, n, 1).to(memory_format=torch.channels_last) for n in (8, 4)]
    x = torch.randn(2, 16, 3, 4).to(memory_format=torch.channels_last)
    units[0].conv(x), layers.convolved(x, units)
    assert len(products) == (2 if vendor == "GenuineIntel" else 0)
    with torch.autocast("cpu", torch.bfloat16):
        layers.convolved(x, units)
    assert len(products) == (3 if vendor == "GenuineIntel" else 1)


@pytest.mark.parametrize("counted", [True, False])
def test_an_average_behind_the_convolution_computes_the_same(counted):
    """Forward, all gradients and the running statistics, against the published order."""
    torch.manual_seed(0)
    ours = layers.BasicConv2d(6, 4, 1, pool=nn.AvgPool2d(3, 1, 1, count_include_pad=counted)).double()
    published, x = copy.deepcopy(ours), torch.randn(2, 6, 5, 4, dtype=torch.double)
    for training in (True, False):
        results = []
        for unit in (ours.train(training), published.train(training)):
            given = x.clone().requires_grad_()
            y = unit(given) if unit is ours else F.relu(unit.bn(unit.conv(unit.pool(given))))
            y.square().sum().backward()
            results.append([y, given.grad, *unit.state_dict().values(), unit.conv.weight.grad])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_in_evaluation_the_batch_norm_follows_the_convolution_directly():
    unit, seen = layers.BasicConv2d(6, 4, 1, pool=nn.AvgPool2d(3, 1, 1)), []
    for name, module in unit.named_modules():
        if name:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    unit.eval()(torch.randn(1, 6, 3, 3))
    unit.train()(torch.randn(1, 6, 3, 3))
    assert seen == ["pool", "conv", "bn", "conv", "pool", "bn"]


@pytest.mark.parametrize("pools", [False, True])
def test_units_on_one_input_are_one_product(pools, products):
    """Outputs, all gradients and running statistics, against each unit alone."""
    torch.manual_seed(0)
    pool = nn.AvgPool2d(3, 1, 1) if pools else None
    units = nn.ModuleList([layers.BasicConv2d(6, 4, 1), layers.BasicConv2d(6, 3, 1, pool=pool)]).double()
    x = torch.randn(2, 6, 5, 4, dtype=torch.double).to(memory_format=torch.channels_last)
    results = []
    for each, num_products in ((copy.deepcopy(units), 1), (units, 2)):
        products.clear()
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        known = layers.convolved(given, each) if num_products == 1 else [None, None]
        outputs = [unit(given, y) for unit, y in zip(each, known, strict=True)]
        assert len(products) == num_products
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)
        sum(y.square().sum() for y in outputs).backward()
        results.append([*outputs, given.grad, *each.state_dict().values(), *(p.grad for p in each.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("others", [(None,), (layers.BasicConv2d(4, 3, 3, padding=1),), ()])
def test_a_single_1x1_convolution_is_computed_alone(others, products):
    x = torch.randn(2, 4, 5, 4).to(memory_format=torch.channels_last)
    units = [layers.BasicConv2d(4, 3, 1), *others]
    assert layers.convolved(x, units) == [None] * len(units) and not products


def test_of_several_units_the_1x1_convolutions_are_merged():
    x = torch.randn(2, 4, 5, 4).to(memory_format=torch.channels_last)
    units = [layers.BasicConv2d(4, 3, 1), None, layers.BasicConv2d(4, 3, 3), layers.BasicConv2d(4, 2, 1)]
    first, *none, last = layers.convolved(x, units)
    assert none == [None, None] and first.shape[1] == 3 and last.shape[1] == 2
    for unit in units[::3]:
        unit.eval()
    assert layers.convolved(x, units) == [None] * 4


def test_gradients_of_merged_convolutions_have_the_strides_of_the_weights():
    """Otherwise DistributedDataParallel warns and copies them."""
    x = torch.randn(2, 4, 5, 4).to(memory_format=torch.channels_last)
    units = [layers.BasicConv2d(4, n, 1).to(memory_format=torch.channels_last) for n in (3, 2)]
    sum(part.square().sum() for part in layers.convolved(x, units)).backward()
    for unit in units:
        assert unit.conv.weight.grad.stride() == unit.conv.weight.stride() == (4, 1, 4, 4)


@pytest.mark.parametrize(
    ("name", "is_training"), [("inception_v3", False), ("inception_v4", False), ("inception_v4", True)]
)
def test_networks_can_be_traced(name, is_training):
    """torch.fx, from which torchvision's and timm's feature extractors are built."""
    network = models.spec(name).build(dropout=0.0).train(is_training).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 107, 107).to(memory_format=torch.channels_last)
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(network)
        assert torch.equal(traced(x), network(x))


@pytest.mark.parametrize("name", models.names())
def test_networks_in_channels_last_are_converted_for_any_batch(name, tmp_path):
    spec = models.spec(name)
    network = spec.build(num_classes=3).to(memory_format=torch.channels_last).eval()
    onnx_conversion.trace(network, spec, tmp_path / "net.onnx", spec.min_size)
    onnx_conversion.check_logits(network, tmp_path / "net.onnx", 3, spec.min_size, "float32", "float32", "")
