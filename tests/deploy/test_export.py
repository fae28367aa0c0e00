"""ONNX files: what atc needs of them, and that a wrong one is never left behind."""

import sys

import numpy as np
import onnx
import pytest
import torch
from support import SIZE, fails, run_script

from common.deploy import export
from common.errors import UserError
from common.evaluation import engines, openvino_engine
from inception_v4.spec import SPEC


def test_file_has_what_atc_takes(chain):
    proto = onnx.load(chain[1001]["onnx"])
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == 11
    assert [value.name for value in proto.graph.input] == ["image"]
    assert [value.name for value in proto.graph.output] == ["class"]
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param and [dim.dim_value for dim in dims[1:]] == [3, SIZE, SIZE]
    operators = {node.op_type for node in proto.graph.node}
    assert "GlobalAveragePool" in operators and "ReduceMean" not in operators and "Dropout" not in operators
    pools = [node for node in proto.graph.node if node.op_type == "AveragePool"]
    assert len(pools) == 14 and all(
        not any(a.name == "count_include_pad" and a.i for a in node.attribute) for node in pools
    )


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_fixed_batch_and_other_opset(tmp_path):
    target = tmp_path / "net.onnx"
    model = Small().train()
    assert export.export_onnx(model, SPEC, target, SIZE, batch=2, opset=13) < 1e-4
    assert model.training
    proto = onnx.load(target)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert proto.opset_import[0].version == 13
    assert list(tmp_path.iterdir()) == [target]


def test_the_difference_is_a_share_of_the_largest_logit(tmp_path):
    model = Small()
    with torch.no_grad():
        model.conv.weight.mul_(1e7)  # an absolute difference would be above 0.01
    assert 0 < export.export_onnx(model, SPEC, tmp_path / "net.onnx", SIZE) < 1e-5


def test_float16_input(tmp_path):
    """Computed in float32: the logits are those of the rounded images."""
    model = Small().eval()
    export.export_onnx(model, SPEC, tmp_path / "net.onnx", SIZE, input_dtype="float16")
    proto = onnx.load(tmp_path / "net.onnx")
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = model(images.half().float()).numpy()
    actual = engines.OnnxEngine(tmp_path / "net.onnx").run(images.numpy())
    np.testing.assert_allclose(actual, expected, atol=1e-6)


class Deeper(torch.nn.Module):
    """Two convolutions and an average pool that counts the padding."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AvgPool2d(3, 1, 1), torch.nn.Conv2d(8, 5, 3)
        )

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(self.body(x * 2 + 1), 1).flatten(1)


def in_openvino(path, images):
    """In float32: by default OpenVINO computes in bfloat16 where the processor can."""
    return openvino_engine.core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]


@pytest.mark.parametrize("opset", [9, 13, 17, 18, 20])
@pytest.mark.parametrize("simplify", [False, True])
def test_every_opset_computes_the_same_in_onnx_runtime_and_openvino(opset, simplify, tmp_path):
    torch.manual_seed(opset)
    model, images = Deeper().eval(), torch.rand(2, 3, SIZE, SIZE)
    export.export_onnx(model, SPEC, tmp_path / "net.onnx", SIZE, opset=opset, simplify=simplify)
    proto = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == opset and engines.OnnxEngine(tmp_path / "net.onnx").metadata["arch"]
    assert simplify == (not any(node.op_type == "Constant" for node in proto.graph.node))
    with torch.inference_mode():
        expected = model(images).numpy()
    for found in (
        engines.OnnxEngine(tmp_path / "net.onnx").run(images.numpy()),
        in_openvino(tmp_path / "net.onnx", images.numpy()),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("input_dtype", export.INPUT_DTYPES)
def test_float16_is_accepted_by_the_checker_and_its_difference_is_reported(input_dtype, tmp_path):
    torch.manual_seed(0)
    model, images = Deeper().eval(), torch.rand(2, 3, SIZE, SIZE)
    options = dict(precision="float16", input_dtype=input_dtype)
    difference = export.export_onnx(model, SPEC, tmp_path / "net.onnx", SIZE, **options)
    assert 1e-5 < difference < 0.01  # float16 has 11 bits
    proto = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert {tensor.data_type for tensor in proto.graph.initializer} == {onnx.TensorProto.FLOAT16}
    engine = engines.OnnxEngine(tmp_path / "net.onnx")
    assert engine.dtype == input_dtype
    with torch.inference_mode():
        expected = model(images.to(getattr(torch, input_dtype)).float()).numpy()
    found = engine.run(images.numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


def test_float16_whose_weights_overflow_is_not_written(tmp_path):
    model = Deeper().eval()
    with torch.no_grad():
        model.body[0].weight.mul_(1e7)  # beyond 65504
    with pytest.raises(UserError, match="ONNX Runtime differs from torch by"):
        export.export_onnx(model, SPEC, tmp_path / "net.onnx", SIZE, precision="float16")
    assert not list(tmp_path.iterdir())


def test_simplify_without_onnxslim_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxslim", None)
    with pytest.raises(UserError, match="--simplify: needs onnxslim; pip install onnxslim"):
        export.export_onnx(Deeper(), SPEC, tmp_path / "net.onnx", SIZE, simplify=True)


class Noisy(torch.nn.Module):
    """Exports as a constant, computes something else every time."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.mean((2, 3)) * self.weight + float(np.random.default_rng().normal())


def test_file_that_computes_something_else_is_not_left(tmp_path):
    (tmp_path / "net.onnx").write_text("the old one")
    with pytest.raises(UserError, match="not written, ONNX Runtime differs from torch by"):
        export.export_onnx(Noisy(), SPEC, tmp_path / "net.onnx", SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "the old one"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], ["--batch: 0"]),
        (["--batch", "many"], ["--batch: many", "dynamic"]),
        (["--opset", "21"], ["--opset: 21", "at most 20"]),
        (["--precision", "int8"], ["--precision: int8", "float16"]),
        (["--ckpt", "nowhere.pth"], ["nowhere.pth", "cannot be read"]),
        (["--chekpoint", "x"], ["--chekpoint", "unknown option"]),
        (["--image-size", "60"], ["--image-size: 60", "75"]),
        (["--num-classes", "10"], ["--num-classes: 10", "holds 1001"]),
        (["--onnx", "/dev/null/x.onnx"], ["--onnx: /dev/null cannot be written to"]),
    ],
)
def test_bad_input_is_one_line(arguments, words, chain, tmp_path):
    given = [*arguments] if "--ckpt" in arguments else ["--ckpt", chain["ckpt"], *arguments]
    fails(run_script("inception_v4/pth2onnx.py", *given, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_without_ckpt_and_without_the_host_it_says_what_to_do(tmp_path):
    done = run_script(
        "inception_v4/pth2onnx.py",
        "--onnx",
        tmp_path / "x.onnx",
        env={"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    )
    fails(done, "--ckpt: not given", "inceptionv4-8e4777a0.pth on another machine")
