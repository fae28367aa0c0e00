"""int8 files: what is rewritten before, that the loss is measured and bounded, and that a run resumes."""

import dataclasses
import json
import os
import pathlib
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from support import FAKE_BIN, draw_images, fails, run_script
from torch import nn

from common.data.transforms import eval_transform, normalize_into
from common.deploy import (
    calibrate,
    channel_scales,
    compare,
    export,
    float_fallback,
    int8_graph,
    om_quantize,
    onnx_runtime,
    postprocess,
    quantize,
    rounding,
)
from common.errors import RunError, UserError
from common.evaluation import engines, onnx_metadata, program
from common.spec import ModelSpec

SIDE = 32


class Small(nn.Module):
    """Input scaling, both kinds of average pool before a 1 x 1 convolution, Concat, classifier."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.counted, self.uncounted = nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.a, self.b, self.c = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        x = torch.relu(self.stem(x * 0.5 + 0.25))
        parts = [self.a(self.counted(x)), self.b(self.uncounted(x)), self.c(x)]
        return self.fc(nn.functional.adaptive_avg_pool2d(torch.relu(torch.cat(parts, 1)), 1).flatten(1))


SPEC = ModelSpec(
    name="small", builder=Small, build_options={"num_classes": 3}, input_size=SIDE, min_size=16, eval_resize=36
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A data set, and a classifier that is right for most of it."""
    folder = tmp_path_factory.mktemp("int8")
    draw_images(folder / "data" / "train", ("ant", "bee", "cat"), 8)
    draw_images(folder / "data" / "val", ("ant", "bee", "cat"), 8, seed=1)
    torch.manual_seed(0)
    model = Small()
    transform, model_data = eval_transform(SPEC), []
    for index, name in enumerate(("ant", "bee", "cat")):
        for path in sorted((folder / "data" / "train" / name).iterdir()):
            pixels = torch.from_numpy(transform(Image.open(path)).copy()).permute(2, 0, 1) / 255
            model_data.append(((pixels - 0.5) / 0.5, index))
    images, targets = torch.stack([x for x, _ in model_data]), torch.tensor([y for _, y in model_data])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
    export.export_onnx(model, SPEC, folder / "net.onnx", SIDE, classes=["ant", "bee", "cat"])
    return folder


def config(work, **options):
    return quantize.QuantizeConfig(data=str(work / "data"), images=16, workers=0, threads=1, **options)


def int8(work, target, **options):
    return quantize.quantize(str(work / "net.onnx"), str(target), config(work, **options), lambda name: SPEC)


def same_top1(work, one, other, folder):
    """Images of a folder of the data set with the same top-1 from two files."""
    transform = eval_transform(SPEC)
    paths = sorted((work / "data" / folder).glob("*/*"))
    pixels = np.stack([transform(Image.open(path)) for path in paths])
    first, second = (engines.EngineClassifier(engines.OnnxEngine(path), SPEC)(pixels) for path in (one, other))
    return int((first.argmax(1) == second.argmax(1)).sum())


def counts(work, model):
    options = program.EvalConfig(data=str(work / "data"), resume=str(model), workers=0)
    return program.evaluate_folder(SPEC, options)[0]


def test_the_file_carries_the_loss_that_eval_finds(work, tmp_path, capsys):
    target = tmp_path / "net_int8.onnx"
    best = int8(work, target, max_drop=10)
    proto = onnx.load(target)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 13  # the float file has 11
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Conv") == 5 and kinds.count("Gemm") == 1 and "Mul" not in kinds
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    dequantized = [
        weights[node.input[0]]
        for node in proto.graph.node
        if node.input
        and node.input[0] in weights
        and node.op_type == "DequantizeLinear"
        and weights[node.input[0]].data_type == TensorProto.INT8
    ]
    assert len(dequantized) == 5  # all convolutions, not the classifier
    scales = [weights[node.input[1]] for node in proto.graph.node if node.input[0] in {w.name for w in dequantized}]
    assert all(len(scale.dims) == 1 for scale in scales)  # one per channel
    quantized = {node.input[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    pool = next(node for node in proto.graph.node if node.op_type == "GlobalAveragePool")
    assert pool.output[0] not in quantized and len(quantized) >= 5

    note = engines.OnnxEngine(target).metadata["quantization"]
    before, after = counts(work, work / "net.onnx"), counts(work, target)
    assert (note["acc1_before"], note["acc1_after"]) == (before.percent(1), after.percent(1))
    assert before.percent(1) > 60 and note["images"] == 24 and note["calibration_images"] == 16
    assert note["method"] == best.method and note["float_layers"] == [] and note["agreement"] >= 90
    assert engines.OnnxEngine(target).metadata["classes"] == ["ant", "bee", "cat"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net_int8.onnx"]
    printed = capsys.readouterr().out
    assert all(f"tried: {method}, 0 layers" in printed for method in calibrate.METHODS)
    assert "OpenVINO" in printed and "note: one of the" not in printed


def test_a_loss_beyond_the_limit_is_an_error_and_writes_nothing(work, tmp_path, monkeypatch, capsys):
    """The search leaves 1, 2 and 4 of 5 convolutions in float32, those first that change the logits most."""
    monkeypatch.setattr(quantize.Trial, "meets", lambda self, config: False)
    with pytest.raises(RunError, match="not written; the best found .* loses .* points of top-1 .* --max-drop 4"):
        int8(work, tmp_path / "x.onnx", max_drop=4, calibration="minmax")
    note = "one of the 24 images of val/ is 4.2 points of top-1, so that --max-drop 4 allows no loss; --max-drop 4.2 allows"
    assert note in capsys.readouterr().out
    assert not (tmp_path / "x.onnx").exists()
    kept = json.loads((tmp_path / "x.onnx.work" / "trials.json").read_text())
    order = sorted(kept["damage"], key=lambda name: -kept["damage"][name])
    assert [trial["float_layers"] for trial in kept["trials"]] == [[], [], order[:1], order[:2], order[:4]]
    assert [trial["method"] for trial in kept["trials"]][:2] == ["minmax", "scaled minmax"]
    errors = [trial["relative_error"] for trial in kept["trials"]]
    assert errors[-1] < errors[0]


def test_the_loss_is_that_of_the_trial(work, tmp_path, monkeypatch):
    """Ranges that are 50 times too small cost accuracy: more than 0.5 points, measured as eval.py does."""
    ranges = calibrate.Calibration.ranges
    monkeypatch.setattr(
        calibrate.Calibration,
        "ranges",
        lambda self, method: {name: (low / 50, high / 50) for name, (low, high) in ranges(self, method).items()},
    )
    with pytest.raises(RunError, match="not written; .*allowed are --max-drop 0.5"):
        int8(work, tmp_path / "x.onnx", calibration="minmax")
    last = json.loads((tmp_path / "x.onnx.work" / "trials.json").read_text())["trials"][-1]
    after = counts(work, tmp_path / "x.onnx.work" / "trial.onnx").percent(1)
    assert last["acc1_after"] == after < last["acc1_before"] - 10


def test_an_interrupted_run_goes_on_where_it_was(work, tmp_path, monkeypatch, capsys):
    real, seen = quantize.Search.calibration_batch, []

    def batch(self, number):
        seen.append(number)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(quantize.Search, "calibration_batch", batch)
    with pytest.raises(KeyboardInterrupt):
        int8(work, tmp_path / "x.onnx", max_drop=10)
    resumed = int8(work, tmp_path / "x.onnx", max_drop=10)
    assert "goes on after 3 of 4 batches" in capsys.readouterr().out
    assert seen[:7] == [0, 0, 1, 0, 1, 0, 1]  # the check of the rewritten graph, then the calibration
    monkeypatch.setattr(quantize.Search, "calibration_batch", real)
    assert resumed == int8(work, tmp_path / "y.onnx", max_drop=10)
    one, other = [onnx.load(tmp_path / name).graph for name in ("x.onnx", "y.onnx")]
    assert one.SerializeToString() == other.SerializeToString()


def test_a_file_of_fixed_batch_size(work, tmp_path):
    """16 images are five batches of three and one too many."""
    proto = onnx.load(work / "net.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(proto, tmp_path / "fixed.onnx")
    options = config(work, max_drop=10, calibration="minmax")
    best = quantize.quantize(str(tmp_path / "fixed.onnx"), str(tmp_path / "x.onnx"), options, lambda name: SPEC)
    engine = engines.OnnxEngine(tmp_path / "x.onnx")
    assert engine.batch == 3 and engine.metadata["quantization"]["calibration_images"] == 15
    assert best.images == 24
    with pytest.raises(UserError, match="--images: 2, but .* is fixed to batches of 3"):
        few = dataclasses.replace(options, images=2)
        quantize.quantize(str(tmp_path / "fixed.onnx"), str(tmp_path / "y.onnx"), few, lambda name: SPEC)


def test_further_photographs_count_for_the_agreement_only(work, tmp_path, capsys):
    best = int8(
        work, tmp_path / "x.onnx", max_drop=10, calibration="minmax", agreement_data=str(work / "data" / "train")
    )
    assert (best.images, best.seen, best.seen_further) == (24, 48, 24)
    agreed = {name: same_top1(work, work / "net.onnx", tmp_path / "x.onnx", name) for name in ("train", "val")}
    assert (best.agreed, best.agreed_further) == (agreed["train"] + agreed["val"], agreed["train"])
    words = f"({100 * agreed['val'] / 24:.3f} % of 24 in val/, {100 * agreed['train'] / 24:.3f} % of 24 in --agreement"
    assert words in capsys.readouterr().out


def test_scaled_channels_are_tried_before_layers_in_float32(work, tmp_path, monkeypatch):
    """One channel has 1,000 times the range of the others, whose weights make up for it: one scale rounds them away."""
    proto = onnx.load(work / "net.onnx")
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in [each for each in proto.graph.node if each.op_type == "Conv"]:
        for name in node.input[1:]:
            array = onnx.numpy_helper.to_array(weights[name]).copy()
            if node.name == "/stem/Conv":
                array[0] *= 1000
            elif array.ndim == 4:
                array[:, 0] /= 1000
            weights[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "uneven.onnx")
    monkeypatch.setattr(quantize.Trial, "meets", lambda self, config: self.method.startswith("scaled"))
    trials, search = [], quantize.Search
    monkeypatch.setattr(quantize, "Search", lambda *given: trials.append(search(*given)) or trials[0])
    options = config(work, calibration="minmax", calibration_data=str(work / "data" / "val"))
    best = quantize.quantize(str(tmp_path / "uneven.onnx"), str(tmp_path / "x.onnx"), options, lambda name: SPEC)
    plain, scaled = trials[0].trials
    assert (plain.method, scaled.method) == ("minmax", "scaled minmax") and scaled == best
    assert scaled.relative_error < plain.relative_error / 3
    note = engines.OnnxEngine(tmp_path / "x.onnx").metadata["quantization"]
    assert (note["method"], note["calibration_images"]) == ("scaled minmax", 32)


def test_moments_of_scaled_channels_follow_from_those_of_the_network(work):
    """An input channel times f has f times the moments with the others, f^2 with itself."""
    proto = int8_graph.prepare(int8_graph.raised(onnx.load(work / "net.onnx")))
    images = np.random.default_rng(0).normal(size=(2, 2, 3, SIDE, SIDE)).astype(np.float32)
    channels = channel_scales.Channels(proto)
    factors = channels.factors(lambda number: images[number], 2)
    scaled = channel_scales.scaled(proto, factors)
    batches = (lambda number: images[number], 2)
    expected, found = rounding.Moments(scaled, *batches), rounding.Moments(proto, *batches)
    geometries = set(rounding._geometries(scaled).values())
    of_tensors = channels.of_tensors(factors)
    assert sum(each.source in of_tensors for each in geometries) == 2 and max(map(np.ptp, factors.values())) > 0.1
    for each in geometries:
        np.testing.assert_allclose(found.of(each, of_tensors), expected.of(each, {}), rtol=1e-4, atol=1e-4)


def linear(weights, batch):
    """A network [N, 2, 1, 1] -> [N, 3]."""
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "two"], ["class"])]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape])
        for name, shape in (("image", [2, 1, 1]), ("class", [3]))
    ]
    tensor = onnx.numpy_helper.from_array(np.array(weights, np.float32), "two")
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("batch", ["n", 4])
def test_images_whose_two_largest_logits_are_close_get_those_of_float32(batch):
    first, exact = linear([[1, 0, -9], [0, 1, -9]], batch), linear([[10, 0, -9], [0, 20, -9]], batch)
    joined = float_fallback.joined(first, exact, 0.5)

    def run(*images):
        return quantize._run(joined, np.array(images, np.float32)[:, :, None, None], 1).tolist()

    images = [[3, 1], [1, 1.25], [2, 1.5], [0, 0]]  # differences 2, 0.25, 0.5 (not closer than the margin) and 0
    assert run(*images) == [[3, 1, -36], [10, 25, -20.25], [2, 1.5, -31.5], [0, 0, 0]]
    assert run(*images[:1] * 4) == [[3, 1, -36]] * 4
    if batch == "n":
        assert run(images[1]) == [[10, 25, -20.25]]
    assert [value.name for value in (*joined.graph.input, *joined.graph.output)] == ["image", "class"]


def test_float_fallback_repeats_doubtful_images_only(work, tmp_path, monkeypatch, capsys):
    """Ranges that are 20 times too small change many top-1; the margin is a multiple of the error that they make."""
    ranges = calibrate.Calibration.ranges
    monkeypatch.setattr(
        calibrate.Calibration,
        "ranges",
        lambda self, method: {name: (low / 20, high / 20) for name, (low, high) in ranges(self, method).items()},
    )
    options = dict(calibration="minmax", max_drop=5, min_agreement=95)
    with pytest.raises(RunError, match="keeps the trials; --float-fallback changes fewer images"):
        int8(work, tmp_path / "x.onnx", **options)
    best = int8(work, tmp_path / "x.onnx", float_fallback=True, **options)
    printed = capsys.readouterr().out
    assert best.agreement >= 95 and 0 < best.repeated <= 24 and best.margin > 0 and not best.float_layers
    assert f"{100 * best.repeated / 24:.2f} % of the images again in float32" in printed
    note = engines.OnnxEngine(tmp_path / "x.onnx").metadata["quantization"]
    assert (note["fallback_margin"], note["fallback_images"]) == (best.margin, best.repeated)
    assert counts(work, tmp_path / "x.onnx").percent(1) == best.acc1_after


def test_the_rewritten_graph_computes_the_same(work):
    """Pools behind the 1 x 1 convolutions, the one that counts the padding as a convolution; no input scaling."""
    proto = int8_graph.prepare(int8_graph.raised(onnx.load(work / "net.onnx")))
    assert [node.op_type for node in proto.graph.node if "Pool" in node.op_type] == ["AveragePool", "GlobalAveragePool"]
    convs = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert len(convs) == 5 and proto.graph.node[0].op_type == "Conv"
    images = np.random.default_rng(0).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    expected = engines.OnnxEngine(work / "net.onnx").run(images)
    np.testing.assert_allclose(quantize._run(proto, images, 1), expected, atol=1e-5)


@pytest.mark.parametrize(("group", "zero_point"), [(1, 0), (2, 0), (1, 40)])
def test_layers_kept_in_float32_compute_in_float32(group, zero_point):
    """Weights 1 and 0.003: one int8 scale for both, as ONNX Runtime chooses by itself, makes the second 0.0039."""

    def quantized(name):
        zero = f"{name}_zero"
        return [
            helper.make_node("QuantizeLinear", [name, f"{name}_scale", zero], [f"{name}_q"]),
            helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_scale", zero], [f"{name}_dq"]),
        ]

    conv = helper.make_node("Conv", ["x_dq", "w", "b"], ["y"], "middle", group=group)
    nodes = [*quantized("x"), conv, *quantized("y")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 1, 4]) for name in ("x", "y_dq")]
    weights = np.diag([1, 0.003]).astype(np.float32) if group == 1 else np.array([[1], [0.003]], np.float32)
    arrays = dict(x_scale=np.float32(0.1), x_zero=np.uint8(zero_point), y_scale=np.float32(0.0005), y_zero=np.uint8(0))
    arrays |= dict(w=weights[:, :, None, None], b=np.array([0, 0.001], np.float32))
    tensors = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    int8_graph.keep_float(proto, ["middle"])
    onnx.checker.check_model(proto, full_check=True)
    images = np.array([0.1, 1, 10, 20], np.float32) * np.ones((1, 2, 1, 4), np.float32)
    found = quantize._run(proto, images, 1)
    np.testing.assert_allclose(found[0, 1, 0], [0.0015, 0.004, 0.031, 0.061], atol=1e-6)  # 0.0013 is 2.6 steps


def test_ranges_of_values_known_in_advance(tmp_path):
    """Of 20,000 values 0..1 and one of 9: min-max keeps it, the percentile of 99.999 and the entropy cut it off."""
    graph = helper.make_graph(
        [helper.make_node("Sigmoid", ["x"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    values = np.random.default_rng(0).random((2, 300_000, 1), np.float32)
    values[1, 7] = 9
    found = calibrate.Calibration(proto, lambda i: values[i], 2, tmp_path / "kept.npz", "key")
    found.collect()
    low, high = found.ranges("minmax")["x"]
    assert low == values.min() and high == 9
    assert found.ranges("percentile")["x"][1] < 1.05 and found.ranges("entropy")["x"][1] < 5
    assert found.ranges("minmax")["y"][1] == pytest.approx(1 / (1 + np.exp(-9)))


def test_rounding_keeps_the_outputs_of_correlated_inputs():
    """Inputs from 6 factors: a twentieth of the squared error. Independent ones: each weight to the nearest integer."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(5, 160))
    scales = np.abs(weights).max(axis=1) / 127
    nearest = np.rint(weights / scales[:, None])
    inputs = rng.normal(size=(4000, 6)) @ rng.normal(size=(6, 160)) + 0.05 * rng.normal(size=(4000, 160))
    found = rounding.round_rows(weights, scales, inputs.T @ inputs, 127)

    def error(integers):
        return (((weights - integers * scales[:, None]) @ inputs.T) ** 2).sum()

    assert error(found) < error(nearest) / 20
    assert np.array_equal(found, np.rint(found)) and np.abs(found).max() <= 127
    np.testing.assert_array_equal(rounding.round_rows(weights, scales, np.eye(160), 127), nearest)
    np.testing.assert_array_equal(rounding.round_rows(weights, scales, np.zeros((160, 160)), 127), nearest)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": (0, 3)}, {"padding": (1, 2), "stride": (2, 1)}])
def test_the_patches_of_rounding_are_those_of_the_convolution(options):
    conv = nn.Conv2d(3, 4, (2, 7), bias=False, **options)
    images = torch.randn(2, 3, 8, 8)
    vertical, horizontal = np.broadcast_to(options.get("padding", 0), 2).tolist()
    pads = (vertical, horizontal, vertical, horizontal)
    strides = tuple(np.broadcast_to(options.get("stride", 1), 2).tolist())
    geometry = rounding._Geometry("x", (2, 7), pads, strides)
    patches = geometry.patches(images.numpy(), np.random.default_rng(0))
    expected = conv(images).detach().numpy()
    assert expected[0, 0].size <= rounding.PATCHES  # all positions, in another order
    found = (patches @ conv.weight.detach().numpy().reshape(4, -1).T).reshape(2, -1, 4)
    for image, outputs in zip(expected, found, strict=True):
        np.testing.assert_allclose(np.sort(image.reshape(4, -1)), np.sort(outputs.T), atol=1e-5)


def test_a_run_keeps_its_rounded_weights_and_leaves_depthwise_ones(work, tmp_path, monkeypatch):
    """The integers of the file are the rounded ones; 4 convolutions, and the pool that became a fifth."""
    seen, real = [], rounding.rounded_weights

    def rounded(proto, quantized, *arguments):
        seen.append((quantized, real(proto, quantized, *arguments)))
        return seen[0][1]

    monkeypatch.setattr(rounding, "rounded_weights", rounded)
    monkeypatch.setattr(quantize.Trial, "check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        int8(work, tmp_path / "x.onnx", max_drop=10)
    monkeypatch.setattr(quantize.Trial, "check", lambda *_: None)
    int8(work, tmp_path / "x.onnx", max_drop=10)
    ((nearest, result),) = seen
    assert (
        len(nearest) == 5
        and len(result) == 4
        and {nearest[name][0].shape[1] for name in set(nearest) - set(result)} == {1}
    )
    assert any((integers != nearest[name][0]).any() for name, integers in result.items())
    written = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "x.onnx").graph.initializer}
    for name, integers in result.items():
        np.testing.assert_array_equal(written[f"{name}_quantized"], integers)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "out.bin"}, ["OUT: out.bin", ".onnx"]),
        ({"target": "plain.onnx"}, ["OUT: plain.onnx is IN; name another file"]),
        ({"source": "missing.onnx"}, ["missing.onnx: does not exist"]),
        ({"source": "small.onnx"}, ["--arch: inception_v3, but small.onnx holds small; leave the option out"]),
        ({"source": "net.pth"}, ["IN: net.pth is no .onnx file"]),
        ({"data": "{val}"}, ["--data", "has no train/"]),
        ({"data": "nowhere"}, ["--data: nowhere has no train/"]),
        ({"agreement": "nowhere"}, ["--agreement-data: nowhere is not a folder"]),
        ({"flag": "--calibration-data=nowhere"}, ["--calibration-data: nowhere is not a folder"]),
        ({"arch": "vgg"}, ["--arch: vgg", "inception_v3"]),
        ({"flag": "--max-drop=-1"}, ["--max-drop: -1", "at least 0"]),
    ],
)
def test_bad_input_is_one_line(change, words, work, tmp_path):
    proto = onnx.load(work / "net.onnx")
    onnx.save(proto, tmp_path / "small.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "plain.onnx")
    arguments = [
        change.get("source", "plain.onnx"),
        change.get("target", "out.onnx"),
        f"--data={change.get('data', work / 'data')}".replace("{val}", str(work / "data" / "val")),
        f"--arch={change.get('arch', 'inception_v3')}",
        *([f"--agreement-data={change['agreement']}"] if "agreement" in change else []),
        *([change["flag"]] if "flag" in change else []),
    ]
    fails(run_script("tools/quantize.py", *arguments, cwd=tmp_path), *words)
    assert not list(tmp_path.glob("out*.onnx"))


def test_a_quantized_file_is_not_quantized_again(work, tmp_path):
    int8(work, tmp_path / "x.onnx", max_drop=10, calibration="minmax")
    with pytest.raises(UserError, match="is quantized already"):
        quantize.quantize(str(tmp_path / "x.onnx"), str(tmp_path / "y.onnx"), config(work), lambda name: SPEC)


@pytest.fixture
def amct(tmp_path, monkeypatch):
    """The stand-in on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "amct_onnx").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE_BIN / "amct_onnx.py"}" "$@"\n')
    (folder / "amct_onnx").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def for_om(work, target, **options):
    return om_quantize.quantize_for_om(str(work / "net.onnx"), str(target), config(work, **options), lambda name: SPEC)


def test_for_om_amct_is_called_and_its_simulation_measured(work, tmp_path, amct, capsys):
    best = for_om(work, tmp_path / "x.onnx", max_drop=10)
    assert best.method == "amct" and best.images == 24
    proto = onnx.load(tmp_path / "x.onnx")
    assert proto.graph.node[0].op_type == "AscendQuant"
    metadata = onnx_metadata.decode({entry.key: entry.value for entry in proto.metadata_props})
    assert metadata["arch"] == "small" and metadata["quantization"]["library"] == "amct_onnx (AMCT)"
    assert metadata["quantization"]["acc1_after"] == best.acc1_after
    printed = capsys.readouterr().out
    command = next(line for line in printed.splitlines() if line.startswith("amct_onnx calibration"))
    assert "--input_shape=image:8,3,32,32" in command and "--batch_num=2" in command
    assert "next: python tools/run_atc.py" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "x.onnx"]


def test_for_om_a_loss_or_a_failure_of_amct_writes_nothing(work, tmp_path, amct, monkeypatch):
    monkeypatch.setenv("FAKE_AMCT_BITS", "1")
    with pytest.raises(RunError, match=r"not written; the best found \(amct"):
        for_om(work, tmp_path / "x.onnx", max_drop=0, min_agreement=100)
    monkeypatch.setenv("FAKE_AMCT_STATUS", "3")
    with pytest.raises(RunError, match="amct_onnx: exit status 3, .*something is wrong"):
        for_om(work, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_for_om_without_amct_the_command_is_printed_and_its_data_kept(work, tmp_path, capsys):
    with pytest.raises(UserError, match="amct_onnx: not on the PATH; .*; install it"):
        for_om(work, tmp_path / "x.onnx")
    line = capsys.readouterr().out.splitlines()[-1]
    words = dict(word.lstrip("-").partition("=")[::2] for word in line.split() if word.startswith("--"))
    kept = sorted(pathlib.Path(words["data_dir"]).iterdir())
    assert [path.stat().st_size for path in kept] == [4 * 8 * 3 * SIDE * SIDE] * 2


@pytest.mark.parametrize("kind", ["int8", "float16"])
def test_the_files_run_like_any_other(kind, work, tmp_path, capsys):
    """run_onnx gives the logits of the engine, its files score as eval.py does, and compare takes both files."""
    target = tmp_path / f"{kind}.onnx"
    if kind == "int8":
        int8(work, target, max_drop=10, calibration="minmax")
    else:
        onnx.save(export._half(onnx.load(work / "net.onnx")), target)
    (tmp_path / "prep").mkdir()
    paths = sorted((work / "data" / "val").rglob("*.jpg"))
    images = np.empty((len(paths), 3, SIDE, SIDE), np.float32)
    for i, path in enumerate(paths):
        normalize_into(images[i], eval_transform(SPEC)(Image.open(path)), SPEC.mean, SPEC.std)
        images[i].tofile(tmp_path / "prep" / f"{path.parent.name}_{path.stem}.bin")
    (tmp_path / "labels.txt").write_text(
        "".join(
            f"{path.parent.name}_{path.stem}.jpg {('ant', 'bee', 'cat').index(path.parent.name)}\n" for path in paths
        )
    )
    options = dict(output=str(tmp_path), output_dirname="res", outfmt="NPY", batchsize=8, threads=1)
    onnx_runtime.run(onnx_runtime.RunOnnxConfig(model=str(target), input=str(tmp_path / "prep"), **options))
    found = np.concatenate(
        [np.load(tmp_path / "res" / f"{p.parent.name}_{p.stem}_0.npy").reshape(1, -1) for p in paths]
    )
    np.testing.assert_allclose(found, engines.OnnxEngine(target).run(images), rtol=1e-5, atol=1e-5)
    scoring = postprocess.PostprocessConfig(
        infer_results=str(tmp_path / "res"), anno_file=str(tmp_path / "labels.txt"), num_classes=3, workers=1
    )
    assert postprocess.score(SPEC, scoring)[0].correct[0] == counts(work, target).correct[0]
    capsys.readouterr()
    gate = compare.CompareConfig(data=str(work / "data"), workers=0, threads=1, min_agreement=90)
    compare.main(str(work / "net.onnx"), str(target), gate, lambda name: SPEC)
    assert "agree" in capsys.readouterr().out
