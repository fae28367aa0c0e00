"""--engine and --fast: equal counts with every engine, what is measured, kept and refused."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from tiny import SPEC

from common.deploy import export
from common.errors import UserError
from common.evaluation import engine_choice, program
from common.evaluation.engines import OnnxEngine
from common.evaluation.metrics import Counts
from common.evaluation.program import EvalConfig
from common.evaluation.torch_classifier import TorchClassifier


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder of one network as net.pth and net.onnx."""
    folder = tmp_path_factory.mktemp("engines")
    torch.manual_seed(3)
    network = SPEC.build(num_classes=3)
    network.fc.weight.data *= 20  # logits of different images differ by more than the rounding of bfloat16
    build = {**SPEC.build_options, "num_classes": 3}
    state = dict(
        arch="tiny", state_dict=network.state_dict(), build=build, image_size=32, classes=["ant", "bee", "cat"]
    )
    torch.save(state, folder / "net.pth")
    export.export(SPEC, export.ExportConfig(ckpt=str(folder / "net.pth"), onnx=str(folder / "net.onnx")))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def evaluate(images, files, capsys):
    """(counts, model, printed text) of an evaluation of net.pth or net.onnx."""

    def start(name, **options):
        config = EvalConfig(
            data=str(images), resume=str(files / name), device="cpu", batch_size=8, workers=0, threads=1, **options
        )
        counts, model = program.evaluate_folder(SPEC, config)
        return counts, model, capsys.readouterr().out

    return start


def way_of(classifier):
    """Engine and precision of a classifier, in the words of a Way."""
    if isinstance(classifier, TorchClassifier):
        return f"torch {'bfloat16' if classifier._amp_type == 'bf16' else 'float32'}"
    if isinstance(classifier.engine, OnnxEngine):
        return "onnxruntime float32"
    return f"openvino {'float32' if classifier.engine.is_float32 else 'bfloat16'}"


@pytest.fixture
def speeds(monkeypatch):
    """{engine and precision: images/s} in place of measurements; nothing takes time to start."""
    found = {"torch float32": 10.0, "onnxruntime float32": 10.0}
    monkeypatch.setattr(engine_choice, "_timed_build", lambda subject, way: (subject.build(way), 0.0))
    monkeypatch.setattr(engine_choice, "_images_per_s", lambda classifier, pixels: found[way_of(classifier)])
    return found


@pytest.mark.parametrize(
    ("name", "engine"),
    [("net.pth", "torch"), ("net.pth", "openvino"), ("net.onnx", "onnxruntime"), ("net.onnx", "openvino")],
)
def test_every_engine_gives_the_counts_of_the_default(evaluate, name, engine):
    plain, _, text = evaluate(name)
    assert text.splitlines()[0].endswith(f" {'torch' if name == 'net.pth' else 'onnxruntime'} float32")
    counts, model, text = evaluate(name, engine=engine)
    assert (counts.correct.tolist(), counts.seen) == (plain.correct.tolist(), plain.seen)
    assert counts.loss == pytest.approx(plain.loss, rel=1e-4)
    assert text.splitlines()[0].endswith(f" {engine} float32")
    assert (model.engine, model.precision) == (engine, "float32")


def test_auto_takes_the_fastest_engine_and_keeps_the_choice_for_this_file(evaluate, speeds):
    speeds["openvino float32"] = 20.0
    _, model, text = evaluate("net.onnx", engine="auto")
    assert (model.engine, model.precision) == ("openvino", "float32")
    assert text.startswith("--engine auto: openvino float32 on 1 threads: 20 images/s, onnxruntime float32 10\n")
    speeds["openvino float32"] = 5.0
    assert evaluate("net.onnx", engine="auto")[2].startswith(text.splitlines()[0])  # kept
    assert evaluate("net.pth", engine="auto")[1].engine == "torch"  # another file is measured


def test_an_engine_that_takes_longer_to_start_than_it_saves_is_not_taken(evaluate, speeds, monkeypatch):
    speeds["openvino float32"] = 20.0  # 21 images: 1.05 s less than the default
    for start, engine in ((1.0, "openvino"), (1.1, "onnxruntime")):
        seconds = {"openvino": start, "onnxruntime": 0.0}
        build = lambda subject, way, seconds=seconds: (subject.build(way), seconds[way.engine])  # noqa: E731
        monkeypatch.setattr(engine_choice, "_timed_build", build)
        monkeypatch.setattr(engine_choice.cache, "read", lambda key: None)
        assert evaluate("net.onnx", engine="auto")[1].engine == engine


@pytest.mark.parametrize("name", ["net.pth", "net.onnx"])
def test_fast_takes_the_fastest_way_whose_results_agree_and_states_the_difference(evaluate, speeds, name, tmp_path):
    own = "torch" if name == "net.pth" else "onnxruntime"
    speeds.update({"torch bfloat16": 15.0, "openvino float32": 20.0, "openvino bfloat16": 40.0})
    _, model, text = evaluate(name, fast=True)
    assert (model.engine, model.precision) == ("openvino", "bfloat16")
    assert text.startswith(f"--fast: openvino bfloat16 on 1 threads: 40 images/s, {own} float32 10; on 21 images ")
    assert f" have the same top-1 as with {own} float32 (allowed: 98 %), logits differ by at most " in text
    config = EvalConfig(data="d", resume="r", metrics_json=str(tmp_path / "metrics.json"))
    program.write_metrics(config, Counts(np.array([1, 1, 1, 1, 1]), 1), model)
    pairs = {item["key"]: item["value"] for item in json.loads((tmp_path / "metrics.json").read_text())["value"]}
    assert (pairs["Engine"], pairs["Precision"]) == ("openvino", "bfloat16")


@pytest.mark.parametrize(("shift", "scale"), [(1, 1.0), (0, 1.2)])
def test_fast_leaves_out_what_gives_other_classes_or_logits(evaluate, speeds, monkeypatch, shift, scale):
    speeds.update({"openvino float32": 5.0, "openvino bfloat16": 40.0})
    run = engine_choice.OpenVinoEngine.run

    def wrong(engine, images):
        logits = run(engine, images)
        return logits if engine.is_float32 else np.roll(logits, shift, axis=1) * scale

    monkeypatch.setattr(engine_choice.OpenVinoEngine, "run", wrong)
    assert evaluate("net.onnx", fast=True)[1][-2:] == ("onnxruntime", "float32")


def test_without_openvino_the_choice_is_among_the_rest_and_says_so(evaluate, speeds, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    with pytest.raises(UserError, match="--engine: openvino is not installed; pip install openvino"):
        evaluate("net.onnx", engine="openvino")
    _, model, text = evaluate("net.onnx", engine="auto")
    assert model.engine == "onnxruntime" and "; openvino is not installed (pip install openvino)\n" in text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("net.onnx", dict(engine="torch"), "--engine: torch needs a checkpoint"),
        ("net.pth", dict(engine="onnxruntime"), "--engine: onnxruntime needs an .onnx file"),
        ("net.pth", dict(fast=True, compile=True), "--fast: not with --compile"),
        ("net.onnx", dict(engine="auto", aipp_config="x"), "--engine: not with .*--aipp-config"),
        ("net.om", dict(fast=True), "--fast: chooses among engines of a CPU"),
    ],
)
def test_options_that_do_not_fit_are_errors(evaluate, name, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(name, **options)


def test_a_quantized_file_is_called_int8(files, tmp_path):
    content = (files / "net.onnx").read_bytes()
    (tmp_path / "int8.onnx").write_bytes(content + b"\x22\x10DequantizeLinear")
    cases = ((files / "net.onnx", "float32"), (files / "net.onnx", "float16"), (tmp_path / "int8.onnx", "float32"))
    precisions = [engine_choice.precision_of(path, np.dtype(kind)) for path, kind in cases]
    assert precisions == ["float32", "float16", "int8"]
