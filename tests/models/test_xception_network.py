"""Xception's network: the same function as the public programs compute with the same weights."""

import onnx
import onnxruntime
import pretrainedmodels
import pytest
import timm
import torch
from support import TESTS, closed_form_image, fill_closed_form
from torch.nn import functional

from xception.src.config import SPEC
from xception.src.Xception import SamePool


@pytest.fixture(scope="module")
def state():
    """Random weights, with batch-norm statistics from a pass over images, so that no logit is vacuous."""
    torch.manual_seed(0)
    model = SPEC.build(pool_padding="torch")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean over the pass
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    with torch.no_grad():
        torch.nn.init.normal_(model.fc.weight, std=0.1)
        for _ in range(2):
            model(torch.rand(4, 3, 128, 128) * 2 - 1)
    return model.state_dict()


def build(state, **options):
    model = SPEC.build(**options)
    model.load_state_dict(state)
    return model.eval()


def images(size):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


def test_parameters_are_those_of_the_paper():
    model = SPEC.build()
    assert sum(p.numel() for p in model.parameters()) == 22_855_952
    assert sum(b.numel() for name, b in model.named_buffers() if "running" in name) == 54_528


@pytest.mark.parametrize("size", [96, 147])
def test_timm_gives_the_same_logits(state, size):
    theirs = timm.create_model("legacy_xception", pretrained=False).eval()
    theirs.load_state_dict(state)
    with torch.inference_mode():
        ours, expected = build(state, pool_padding="torch")(images(size)), theirs(images(size))
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() <= 1e-5


def test_pretrainedmodels_gives_the_same_logits(state):
    theirs = pretrainedmodels.xception(pretrained=None).eval()
    theirs.load_state_dict({name.replace("fc.", "last_linear."): tensor for name, tensor in state.items()})
    with torch.inference_mode():
        ours, expected = build(state, pool_padding="torch")(images(128)), theirs(images(128))
    assert (ours - expected).abs().max() <= 1e-5


def keras_forward(w, x, eps):
    """Xception as keras.applications writes it down: explicit SAME padding everywhere, NCHW."""

    def same(x, kernel, stride, value=0.0):
        pads = []
        for side in (x.shape[3], x.shape[2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return functional.pad(x, pads, value=value)

    def norm(x, name):
        return functional.batch_norm(
            x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"], eps=eps
        )

    def separable(x, name):
        x = functional.conv2d(same(x, 3, 1), w[f"{name}.conv1.weight"], groups=x.shape[1])
        return functional.conv2d(x, w[f"{name}.pointwise.weight"])

    x = norm(functional.conv2d(x, w["conv1.weight"], stride=2), "bn1").relu()
    x = norm(functional.conv2d(x, w["conv2.weight"]), "bn2").relu()
    for block in range(1, 13):
        y = x
        for i in range(3 if 4 <= block <= 11 else 2):
            first = 3 * i + (block > 1)
            y = y.relu()  # block1's input is activated already
            y = norm(separable(y, f"block{block}.rep.{first}"), f"block{block}.rep.{first + 1}")
        if f"block{block}.skip.weight" in w:
            y = functional.max_pool2d(same(y, 3, 2, float("-inf")), 3, stride=2)
            x = norm(functional.conv2d(same(x, 1, 2), w[f"block{block}.skip.weight"], stride=2), f"block{block}.skipbn")
        x = y + x
    x = norm(separable(x, "conv3"), "bn3").relu()
    x = norm(separable(x, "conv4"), "bn4").relu()
    return x.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


@pytest.mark.parametrize(("size", "eps"), [(71, 1e-5), (96, 1e-3), (101, 1e-5), (299, 1e-3)])
def test_same_padding_is_keras_and_mindspores(state, size, eps):
    with torch.inference_mode():
        x = images(size)[:1]
        ours = build(state, pool_padding="same", bn_eps=eps)(x)
        assert (ours - keras_forward(state, x, eps)).abs().max() <= 1e-5


def test_the_two_paddings_differ_where_a_side_is_even(state):
    """At 299 the sides before the pools are 147, 74, 37, 19: block2's alone is even, and the logits show it."""
    with torch.inference_mode():
        x = images(299)[:1]
        same, padded = (build(state, pool_padding=phase)(x) for phase in ("same", "torch"))
        assert (same - padded).abs().max() > 1e-3
        for side in (147, 37, 19):
            x = torch.randn(1, 2, side, side)
            assert torch.equal(SamePool()(x), functional.max_pool2d(x, 3, 2, padding=1))
        x = torch.randn(1, 2, 74, 74)
        assert not torch.equal(SamePool()(x), functional.max_pool2d(x, 3, 2, padding=1))
        assert SamePool()(x).shape[-1] == 37


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_same_padding_survives_the_export(tmp_path):
    """Odd and even sides in one graph at opset 11, batch axis dynamic, one MaxPool and nothing else."""
    file = tmp_path / "pool.onnx"
    torch.onnx.export(
        SamePool(),
        (torch.zeros(1, 3, 74, 37),),
        str(file),
        opset_version=11,
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "batch"}},
    )
    assert [node.op_type for node in onnx.load(file).graph.node] == ["MaxPool"]
    x = -torch.rand(3, 3, 74, 37)  # negative: a pool that pads with zeros would show
    ours = onnxruntime.InferenceSession(str(file)).run(None, {"x": x.numpy()})[0]
    assert (torch.from_numpy(ours) == SamePool()(x)).all()


def test_the_smallest_input_works_and_dropout_drops(state):
    model = build(state)
    assert model(images(SPEC.min_size)).shape == (2, 1000)
    features = torch.ones(1, 2048)
    model.dropout.train()
    assert (model.dropout(features) == 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_closed_form_logits_are_those_of_mindspore():
    """The golden logits were printed by the official layer stack in MindSpore, filled with the same numbers."""
    import json

    golden = json.loads((TESTS / "golden" / "xception_mindspore.json").read_text())
    model = SPEC.build(pool_padding="same", bn_eps=1e-5).eval()
    fill_closed_form(model.state_dict())
    with torch.inference_mode():
        logits = model(torch.from_numpy(closed_form_image(299)))[0, :10]
    assert (logits - torch.tensor(golden["logits"])).abs().max() <= 1e-4
