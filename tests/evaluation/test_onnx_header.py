"""common/evaluation/onnx_header.py: what it reads is what the onnx package reads; other content is no header."""

import onnx
import pytest
from onnx import TensorProto, helper

from common.evaluation import onnx_header

DTYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.UINT8: "uint8"}


@pytest.fixture(params=[(TensorProto.FLOAT, ["batch", 3, 299, 299]), (TensorProto.UINT8, [8, 75, 75, 3])])
def file(request, tmp_path):
    """An .onnx file of one convolution, whose weights are listed as an input too, as old files do."""
    dtype, shape = request.param
    weights = helper.make_tensor("weights", TensorProto.FLOAT, [4, 3, 1, 1], [0.5] * 12)
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "weights"], ["class"], name="QuantizeLinear is a name here"),
    ]
    inputs = [helper.make_tensor_value_info("image", dtype, shape)]
    inputs.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, [4, 3, 1, 1]))
    outputs = [helper.make_tensor_value_info("class", TensorProto.FLOAT, [shape[0], 1000])]
    model = helper.make_model(helper.make_graph(nodes, "graph", inputs, outputs, [weights]))
    helper.set_model_props(model, {"arch": "tiny", "classes": '["Ameise", "蜂"]', "empty": ""})
    onnx.save(model, tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def test_a_header_holds_what_the_onnx_package_reads(file):
    found, model = onnx_header.read(file), onnx.load(file)
    first = model.graph.input[0].type.tensor_type
    shape = [axis.dim_param or axis.dim_value for axis in first.shape.dim]
    assert found.inputs == [onnx_header.Value("image", DTYPES[first.elem_type], shape)]
    assert [(value.name, value.shape[-1]) for value in found.outputs] == [("class", 1000)]
    assert found.metadata == {entry.key: entry.value for entry in model.metadata_props}
    assert found.operators == {"Cast", "Conv"} and found.is_classifier


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PK\3\4" + b, lambda b: b + b"\xff"]
)
def test_other_content_is_no_header(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    assert onnx_header.read(file) is None
    assert onnx_header.read(file.with_name("missing.onnx")) is None
