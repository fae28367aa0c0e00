"""ONNX files of other programs: layouts of the input, shapes that are no classifier, foreign metadata."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from common.deploy import result_files
from common.errors import UserError
from common.evaluation import engines, onnx_metadata
from common.spec import ModelSpec

SPEC = ModelSpec(name="small", builder=object, build_options={}, input_size=8, min_size=8, eval_resize=8)


def write_model(path, shape, kind="float", output=("n", 3), metadata=()):
    """Means of the channels: logits of a network that any layout can express."""
    is_last = shape[-1] == 3 and shape[0] != 3
    dtype = {"float": TensorProto.FLOAT, "uint8": TensorProto.UINT8}[kind]
    nodes = [helper.make_node("Cast", ["image"], ["numbers"], to=TensorProto.FLOAT)]
    nodes += [
        helper.make_node("ReduceMean", ["numbers"], ["y"], axes=[1, 2] if is_last else [2, 3], keepdims=len(output) > 2)
    ]
    inputs = [helper.make_tensor_value_info("image", dtype, ["n", *shape])]
    graph = helper.make_graph(nodes, "net", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    helper.set_model_props(proto, dict(metadata))
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 3), (3, "s", "s"), ("s", "s", 3)])
def test_channels_first_and_last_compute_the_same(tmp_path, shape, kind):
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    classifier = engines.EngineClassifier(engines.OnnxEngine(write_model(tmp_path / "x.onnx", shape, kind)), SPEC)
    expected = pixels_NHWC.mean((1, 2))
    if kind == "float":
        expected = (expected / 255 - SPEC.mean) / SPEC.std
    np.testing.assert_allclose(classifier(pixels_NHWC), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "output", "words"),
    [
        ((3, 8, 16), ("n", 3), "input has shape N x 3 x 8 x 16; expected N x 3 x S x S or N x S x S x 3"),
        ((1, 8, 8), ("n", 1), "input has shape N x 1 x 8 x 8"),
        ((3, 8, 8), ("n", 3, 1, 1), "output has shape n x 3 x 1 x 1; expected images x classes"),
    ],
)
def test_what_is_no_classifier_of_square_images_is_refused(tmp_path, shape, output, words):
    with pytest.raises(UserError, match=words):
        engines.OnnxEngine(write_model(tmp_path / "x.onnx", shape, output=output))


def test_metadata_of_other_programs_is_left_out(tmp_path):
    foreign = {"classes": "ants,bees", "image_size": "128px", "mean": "0.5", "std": '{"r": 1}', "arch": "resnet"}
    metadata = engines.OnnxEngine(write_model(tmp_path / "x.onnx", (3, 8, 8), metadata=foreign)).metadata
    assert metadata == {"arch": "resnet"} and onnx_metadata.network(metadata) == ""
    numbers = {"image_size": "true", "classes": '{"0": "ants"}', "quantization": "[]", "precision": "16"}
    assert onnx_metadata.decode(numbers) == {}
    own = onnx_metadata.OnnxMetadata(arch="small", image_size=8, mean=[0.0, 0.5, 1.0], std=[1.0] * 3, classes=["a"])
    assert onnx_metadata.decode(onnx_metadata.encode(own)) == own


def test_an_input_file_of_another_layout_is_refused(tmp_path):
    """Not reshaped: the numbers would be those of other pixels."""
    out = np.zeros((3, 4, 4), np.float32)
    np.save(tmp_path / "x.npy", np.arange(48, dtype=np.float32).reshape(1, 3, 4, 4))
    result_files.load_sample(tmp_path / "x.npy", out)
    assert out.ravel().tolist() == list(range(48))
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(UserError, match="x.npy has shape 1x4x4x3, the model takes 3x4x4"):
        result_files.load_sample(tmp_path / "x.npy", out)
    (tmp_path / "preprocess.json").write_text('{"model": "small", "dtype": "uint8"}')
    result_files.check_layout([tmp_path / "x.bin"], (4, 4, 3))
    with pytest.raises(UserError, match=r"holds N x S x S x 3 \(--dtype uint8\), the model takes N x 3 x S x S"):
        result_files.check_layout([tmp_path / "x.bin"], (3, 4, 4))
