"""ONNX files: what atc needs of them, and that a wrong one is never left behind."""

import numpy as np
import onnx
import pytest
import torch
from support import SIZE, fails, run_script

from common.deploy import export
from common.errors import UserError
from common.evaluation import engines
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
        (["--opset", "20"], ["--opset: 20", "at most 18"]),
        (["--ckpt", "nowhere.pth"], ["nowhere.pth", "cannot be read"]),
        (["--chekpoint", "x"], ["--chekpoint", "unknown option"]),
        (["--image-size", "60"], ["--image-size: 60", "75"]),
        (["--num-classes", "10"], ["--num-classes: 10", "holds 1001"]),
        (["--onnx", "no/such/folder/x.onnx"], ["--onnx", "is not a folder"]),
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
