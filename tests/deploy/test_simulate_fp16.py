"""run_onnx.py --simulate-fp16: errors of layers against numbers computed by hand and against numpy's float16."""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import SIZE, fails, run_ok, run_script, write_pooling_onnx

from common.deploy import simulate_fp16
from common.errors import UserError


def write(path, nodes, weights=(), shape=("N", 4), output=("N", 4), kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(output))],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in dict(weights).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6), path)
    return path


def simulate(path, *batches):
    simulation = simulate_fp16.Simulation(path, threads=1)
    for number, images in enumerate(batches):
        simulation.run(np.asarray(images, np.float32), [f"{number}_{i}.bin" for i in range(len(images))])
    return simulation, {layer.name: layer for layer in simulation.layers}


def test_overflow_and_cancellation_are_found_in_their_layers(tmp_path):
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["big"], name="scale"),
        helper.make_node("Mul", ["big", "inverse"], ["back"], name="unscale"),
        helper.make_node("Add", ["back", "thousand"], ["shifted"], name="shift"),
        helper.make_node("Sub", ["shifted", "thousand"], ["difference"], name="cancel"),
        helper.make_node("Relu", ["difference"], ["y"], name="relu"),
    ]
    path = write(tmp_path / "net.onnx", nodes, {"k": [30000.0], "inverse": [1 / 30000], "thousand": [1000.0]})
    simulation, layers = simulate(path, [[1, 1.1, 1.2, 3]])
    assert layers["scale"].error == math.inf and layers["scale"].overflows and layers["scale"].largest == 90000
    assert not layers["unscale"].overflows and layers["unscale"].network_error == math.inf
    # float16 has steps of 0.5 from 512 to 1024: 1001, 1001.1, 1001.2, 1003 lose 0, 0.1, 0.2, 0.
    lost = math.sqrt(0.1**2 + 0.2**2)
    exact = np.array([1001, 1001.1, 1001.2, 1003])
    assert layers["shift"].error == pytest.approx(lost / np.linalg.norm(exact), rel=1e-3)
    assert layers["cancel"].error == pytest.approx(lost / np.linalg.norm(exact - 1000), rel=1e-3)
    names = [line.split()[0] for line in simulation.report(0)]
    assert names == ["layer", "scale", "unscale", "cancel", "relu", "shift", "overflow:", "top-1:"]
    lines = list(simulation.report(2))
    assert lines[1].endswith("overflow") and lines[2].split()[0] == "unscale" and lines[3].startswith("3 more layers")
    assert lines[4] == "overflow: 1 layers exceed 65504, the first is scale"


def test_weights_are_rounded_sums_are_not(tmp_path):
    rng = np.random.default_rng(0)
    weight, images = rng.normal(size=(4, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    path = write(tmp_path / "net.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": weight})
    layer = simulate(path, images)[1]["fc"]

    def rounded(values):
        return values.astype(np.float16).astype(np.float32)

    exact, device = images @ weight, rounded(rounded(images) @ rounded(weight))
    expected = np.linalg.norm(device - exact) / np.linalg.norm(exact)
    assert layer.error == pytest.approx(expected, rel=1e-3) and layer.network_error == layer.error
    assert 1e-4 < layer.error < 1e-3 and layer.largest == pytest.approx(np.abs(exact).max())


def test_errors_add_up_over_layers_and_the_worst_run_counts(tmp_path):
    nodes = [
        helper.make_node("Mul", ["x", "third"], ["a"], name="first"),
        helper.make_node("Mul", ["a", "third"], ["b"], name="second"),
        helper.make_node("Mul", ["b", "third"], ["y"], name="third"),
    ]
    path = write(tmp_path / "net.onnx", nodes, {"third": [1 / 3]})
    images = np.linspace(1, 2, 4, dtype=np.float32)[None]
    _, layers = simulate(path, images * 0, images, images * 0)
    network, exact = images.astype(np.float16), images.astype(np.float64)
    for name in ("first", "second", "third"):
        network = (network.astype(np.float32) * np.float32(np.float16(1 / 3))).astype(np.float16)
        exact = exact / 3
        expected = np.linalg.norm(network - exact) / np.linalg.norm(exact)
        assert layers[name].network_error == pytest.approx(expected, rel=1e-2)
    assert layers["third"].network_error > layers["third"].error > 0


def test_images_whose_top_1_changes_are_named(tmp_path):
    nodes = [helper.make_node("Add", ["x", "zero"], ["y"])]
    path = write(tmp_path / "net.onnx", nodes, {"zero": [0.0] * 4})
    # 2049 and 2050 are 2048 and 2050 in float16; 2049.5 and 2050.5 are both 2050, and the first of equals wins.
    simulation, _ = simulate(path, [[0, 2049, 2050, 0], [0, 2049.5, 2050.5, 0]], [[9, 1, 1, 1]])
    assert simulation.changed == [("0_1.bin", 2, 1)] and simulation.num_images == 3
    assert list(simulation.report(0))[-1].startswith("top-1: differs for 1 of 3 images: 0_1.bin (2 -> 1); error of the")
    filled = simulate_fp16.Simulation(path)
    filled.run(np.array([[9, 1, 1, 1], [0, 2049.5, 2050.5, 0]], np.float32), ["only.bin"])
    assert filled.changed == [] and filled.num_images == 1


def test_values_that_are_not_float32_pass_through(tmp_path):
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["float"], ["shape"]),
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.float32([1.1]))),
        helper.make_node("Reshape", ["float", "shape"], ["same"]),
        helper.make_node("Mul", ["same", "k"], ["y"]),
    ]
    path = write(tmp_path / "net.onnx", nodes, kind=TensorProto.FLOAT16)
    simulation = simulate_fp16.Simulation(path)
    simulation.run(np.ones((1, 4), np.float16), ["a"])
    by_type = {layer.op_type: layer.error for layer in simulation.layers}
    assert by_type["Cast"] == by_type["Reshape"] == 0 and "Constant" not in by_type and "Shape" not in by_type
    assert by_type["Mul"] == pytest.approx(abs(float(np.float16(1.1)) - 1.1) / 1.1, rel=1e-2)


def test_models_that_cannot_be_simulated(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Constant", [], ["is"], value=numpy_helper.from_array(np.array([True]))),
        helper.make_node("If", ["is"], ["y"], then_branch=branch, else_branch=branch),
    ]
    with pytest.raises(UserError, match="control flow"):
        simulate_fp16.Simulation(write(tmp_path / "if.onnx", nodes))


def test_program_over_input_files(tmp_path):
    write_pooling_onnx(tmp_path / "net.onnx")
    (tmp_path / "in").mkdir()
    for i in range(120):
        np.full((3, SIZE, SIZE), i, np.float32).tofile(tmp_path / "in" / f"i_{i}.bin")
    arguments = ("tools/run_onnx.py", "--model", "net.onnx", "--simulate-fp16")
    out = run_ok(*arguments, "--input", "in", "--batchsize", 7, "--layers", 1, cwd=tmp_path)
    assert "[INFO] float16 simulation of 60 of 120 files" in out and "more layers with an error of" in out
    assert "top-1: differs for 0 of 60 images; error of the logits" in out and "throughput" not in out
    fails(run_script(*arguments, cwd=tmp_path), "--simulate-fp16: needs --input")
    fails(run_script(*arguments, "--input", "in", "--output", ".", cwd=tmp_path), "leave out --output")
