"""--engine and --fast: equal counts with every engine, what is measured, kept and refused."""

import copy
import json
import os
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from support import ROOT
from tiny import SPEC

from common.data import cache
from common.deploy import export
from common.errors import UserError
from common.evaluation import (
    engine_choice,
    engines,
    onnx_conversion,
    onnx_header,
    openvino_engine,
    predictions,
    program,
)
from common.evaluation.engines import OnnxEngine
from common.evaluation.metrics import Counts
from common.evaluation.program import EvalConfig
from common.evaluation.torch_classifier import TorchClassifier
from common.weights import load


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder of one network as net.pth and net.onnx."""
    folder = tmp_path_factory.mktemp("engines")
    torch.manual_seed(3)
    network = SPEC.build(num_classes=3)
    network.fc.weight.data *= 20  # logits of different images differ by more than the rounding of bfloat16
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked.fill_(3)  # a training so short that its loss may need a note
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
    monkeypatch.setattr(engine_choice, "multiplies_bfloat16", lambda: True)


@pytest.fixture
def evaluate(images, files, capsys):
    """(counts, model, printed text) of an evaluation of net.pth or net.onnx."""

    def start(name, **options):
        settings = dict(device="cpu", batch_size=8, workers=0, threads=1) | options
        config = EvalConfig(**{"data": str(images), "resume": str(files / name), **settings})
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
    monkeypatch.setattr(engine_choice, "_images_per_s", lambda classifier, *_: found[way_of(classifier)])
    return found


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("net.pth", "torch"),
        ("net.pth", "onnxruntime"),
        ("net.pth", "openvino"),
        ("net.onnx", "onnxruntime"),
        ("net.onnx", "openvino"),
    ],
)
def test_every_engine_gives_the_counts_of_the_default(evaluate, name, engine):
    plain, _, text = evaluate(name)
    assert text.splitlines()[0].endswith(f" {'torch' if name == 'net.pth' else 'onnxruntime'} float32")
    counts, model, text = evaluate(name, engine=engine)
    assert (counts.correct.tolist(), counts.seen) == (plain.correct.tolist(), plain.seen)
    assert counts.loss == pytest.approx(plain.loss, rel=1e-4)
    assert text.splitlines()[0].endswith(f" {engine} float32")
    assert (model.engine, model.precision) == (engine, "float32")


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("net.pth", "default"),
        ("net.onnx", "default"),
        ("net.pth", "onnxruntime"),
        ("net.pth", "openvino"),
        ("net.onnx", "openvino"),
    ],
)
def test_several_runs_at_a_time_give_the_counts_and_the_rows_of_one(evaluate, tmp_path, name, engine):
    found = []
    for threads, workers in ((1, 0), (2, 2), (9, 2)):
        file = tmp_path / f"{threads}.csv"
        counts, model, _ = evaluate(name, engine=engine, threads=threads, workers=workers, predictions=str(file))
        assert model.classifier.streams == {1: 0, 2: 2, 9: 4}[threads]
        rows = [(row.path, row.label, row.best[0].index) for row in predictions.read(str(file))]
        found.append((counts.correct.tolist(), counts.seen, rows))
    assert found[0] == found[1] == found[2]


@pytest.fixture
def reads(monkeypatch):
    """One entry for each checkpoint that was read."""
    found = []

    def load_model(*args, **options):
        found.append(args)
        return load.load_model(*args, **options)

    monkeypatch.setattr(program, "load_model", load_model)
    return found


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_checkpoint_is_converted_once_and_later_starts_do_not_read_it(evaluate, reads, engine):
    counts, model, text = evaluate("net.pth", engine=engine)
    again, kept, text_again = evaluate("net.pth", engine=engine)
    assert len(reads) == 1 and (again.correct.tolist(), again.loss) == (counts.correct.tolist(), counts.loss)
    same = ("num_outputs", "image_size", "classes", "taken", "engine", "precision", "short_training")
    assert all(getattr(kept, name) == getattr(model, name) for name in same)
    assert text_again.splitlines()[1:] == text.splitlines()[1:]
    other = {"onnxruntime": "openvino", "openvino": "onnxruntime"}[engine]  # reads the same copy
    assert evaluate("net.pth", engine=other)[0].correct.tolist() == counts.correct.tolist() and len(reads) == 1
    evaluate("net.pth", engine=engine, use_ema=False)  # perhaps other weights of the file
    assert len(reads) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        lambda content: content.replace(b'"num_outputs": 3', b'"num_outputs": 4'),
        lambda content: content.replace(b'"facts"', b'"other"'),
    ],
)
def test_a_damaged_conversion_is_made_again(evaluate, reads, tmp_path, damage):
    counts, _, _ = evaluate("net.pth", engine="openvino")
    (cached,) = (tmp_path / "cache" / "image-zoo").glob("*.converted")
    content = cached.read_bytes()
    assert damage(content) != content
    cached.write_bytes(damage(content))
    assert evaluate("net.pth", engine="openvino")[0].correct.tolist() == counts.correct.tolist()
    assert len(reads) == 2 and cached.read_bytes()[-64:] == content[-64:]
    evaluate("net.pth", engine="openvino")
    assert len(reads) == 2


def test_a_conversion_that_computes_other_logits_is_refused_and_not_kept(evaluate, monkeypatch, tmp_path):
    trace = onnx_conversion.trace

    def wrong(network, *args):
        network = copy.deepcopy(network)
        network.fc.bias.data += 0.01
        trace(network, *args)

    monkeypatch.setattr(onnx_conversion, "trace", wrong)
    with pytest.raises(UserError, match="--engine: give torch, ONNX Runtime differs from torch by 0.01 where"):
        evaluate("net.pth", engine="onnxruntime")
    assert not list((tmp_path / "cache").rglob("*.converted"))
    assert evaluate("net.pth", engine="auto")[1].engine == "torch"


def test_processes_that_convert_a_checkpoint_at_once_leave_one_whole_file(files, images, tmp_path):
    code = (
        "from tiny import SPEC; from common.evaluation import program; import sys\n"
        "config = program.EvalConfig(data=sys.argv[1], resume=sys.argv[2],device='cpu', engine='openvino')\n"
        "counts, _ = program.evaluate_folder(SPEC, config)\n"
        "print(counts.correct.tolist(), 'torch' in sys.modules)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(images), str(files / "net.pth")]
    start = lambda: subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)  # noqa: E731
    first, second = start(), start()
    lines = [process.communicate()[0].splitlines()[-1] for process in (first, second)]
    assert lines[0] == lines[1] and lines[0].endswith(" True")
    assert len(list((tmp_path / "cache" / "image-zoo").glob("*converted*"))) == 1
    later, _ = start().communicate()
    assert later.splitlines()[-1] == lines[0].replace("True", "False")  # torch is not imported


def test_only_the_newest_conversions_are_kept(tmp_path):
    for i in range(6):
        cache.write(f"key {i}", {"number": i}, {"weights": np.full(3, i)}, ".converted")
        os.utime(cache.path(f"key {i}", ".converted"), (i, i))
    cache.write("key 0", {"number": "of another kind"}, {})
    cache.keep_newest(".converted", 4)
    kept = [cache.read(f"key {i}", ".converted") for i in range(6)]
    assert kept[:2] == [None, None] and [header["number"] for header, _ in kept[2:]] == [2, 3, 4, 5]
    assert cache.read("key 0")[0] == {"number": "of another kind"}


@pytest.mark.parametrize("num_images", [0, 1, 5, 120, 121])
@pytest.mark.parametrize(("size", "streams"), [(4, 2), (4, 4), (16, 0), (1, 2)])
def test_runs_cover_the_images_and_grow_smaller_at_the_end(num_images, size, streams):
    sizes = engines.run_sizes(num_images, size, streams)
    assert sum(sizes) == num_images and all(0 < each <= size for each in sizes)
    assert sizes == sorted(sizes, reverse=True)
    if streams and num_images:
        assert sizes[-1] == 1 and sizes[0] == min(size, -(-num_images // (2 * streams)))
    fixed = engines.run_sizes(num_images, size, streams, is_fixed=True)
    assert sum(fixed) == num_images and all(each == size for each in fixed[:-1])


def test_bfloat16_is_measured_only_where_the_processor_multiplies_it(evaluate, speeds, monkeypatch):
    monkeypatch.setattr(engine_choice, "multiplies_bfloat16", lambda: False)
    speeds["openvino float32"] = 20.0
    _, model, _ = evaluate("net.onnx", fast=True)  # bfloat16 has no speed: measuring it would be a KeyError
    assert (model.engine, model.precision) == ("openvino", "float32")


def test_auto_takes_the_fastest_engine_and_keeps_the_choice_for_this_file(evaluate, speeds):
    speeds["openvino float32"] = 20.0
    _, model, text = evaluate("net.onnx", engine="auto")
    assert (model.engine, model.precision) == ("openvino", "float32")
    assert text.startswith("--engine auto: openvino float32 on 1 threads: 20 images/s, onnxruntime float32 10\n")
    speeds["openvino float32"] = 5.0
    assert evaluate("net.onnx", engine="auto")[2].startswith(text.splitlines()[0])  # kept
    assert evaluate("net.pth", engine="auto")[1].engine == "torch"  # another file is measured


def test_a_machine_that_is_slow_for_a_while_does_not_decide(evaluate, speeds, monkeypatch):
    """ONNX Runtime 10 images/s, OpenVINO 9; half of that in the first five measurements."""
    calls = []

    def measured(classifier, *_):
        calls.append(way_of(classifier))
        return {"onnxruntime float32": 10.0, "openvino float32": 9.0}[calls[-1]] * (0.5 if len(calls) <= 5 else 1)

    monkeypatch.setattr(engine_choice, "_images_per_s", measured)
    assert evaluate("net.onnx", engine="auto")[1].engine == "onnxruntime"
    assert len(calls) == 10 and len(set(calls)) == 2


def test_an_engine_that_takes_longer_to_start_than_it_saves_is_not_taken(evaluate, speeds, monkeypatch):
    speeds["openvino float32"] = 20.0  # 21 images: 1.05 s less than the default
    for start, engine in ((1.0, "openvino"), (1.1, "onnxruntime")):
        seconds = {"openvino": start, "onnxruntime": 0.0}
        build = lambda subject, way, seconds=seconds: (subject.build(way), seconds[way.engine])  # noqa: E731
        monkeypatch.setattr(engine_choice, "_timed_build", build)
        monkeypatch.setattr(engine_choice.cache, "read", lambda key: None)
        assert evaluate("net.onnx", engine="auto")[1].engine == engine


def test_the_first_conversion_of_a_checkpoint_does_not_count_as_time_to_start(evaluate, monkeypatch):
    convert = onnx_conversion.convert

    def slow(*args):
        time.sleep(5)
        return convert(*args)

    monkeypatch.setattr(onnx_conversion, "convert", slow)
    found = {"torch float32": 10.0, "onnxruntime float32": 1.0, "openvino float32": 20.0}  # 21 images: 1.05 s less
    monkeypatch.setattr(engine_choice, "_images_per_s", lambda classifier, *_: found[way_of(classifier)])
    assert evaluate("net.pth", engine="auto")[1].engine == "openvino"


@pytest.mark.parametrize(("seconds", "engine"), [(0, "torch"), (3, "openvino")])
def test_loading_a_checkpoint_with_torch_counts_as_time_to_start(evaluate, monkeypatch, seconds, engine):
    prepare = program.prepare

    def slow(*args):
        time.sleep(seconds)
        return prepare(*args)

    monkeypatch.setattr(program, "prepare", slow)
    found = {"torch float32": 21.0, "onnxruntime float32": 1.0, "openvino float32": 10.5}  # 21 images: 1 s more
    monkeypatch.setattr(engine_choice, "_images_per_s", lambda classifier, *_: found[way_of(classifier)])
    assert evaluate("net.pth", engine="auto")[1].engine == engine


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
    run = openvino_engine.OpenVinoEngine.run

    def wrong(engine, images):
        logits = run(engine, images)
        return logits if engine.is_float32 else np.roll(logits, shift, axis=1) * scale

    monkeypatch.setattr(openvino_engine.OpenVinoEngine, "run", wrong)
    _, model, _ = evaluate("net.onnx", fast=True)
    assert (model.engine, model.precision) == ("onnxruntime", "float32")


def test_an_exported_file_is_scored_without_torch(files, images, tmp_path):
    code = (
        "from tiny import SPEC; from common.evaluation import program; import sys\n"
        "program.evaluate_folder(SPEC, program.EvalConfig(data=sys.argv[1], resume=sys.argv[2], threads=2))\n"
        "print([name for name in ('torch', 'onnx', 'pandas', 'multiprocessing.pool') if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", code, str(images), str(files / "net.onnx")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_without_openvino_the_choice_is_among_the_rest_and_says_so(evaluate, speeds, monkeypatch, tmp_path):
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: False)
    with pytest.raises(UserError, match="--engine: openvino is not installed; pip install openvino"):
        evaluate("net.onnx", engine="openvino")
    with pytest.raises(UserError, match="--engine: openvino is not installed"):
        evaluate("net.pth", engine="openvino", fast=True)
    assert not list((tmp_path / "cache").rglob("*.converted"))
    _, model, text = evaluate("net.onnx", engine="auto")
    assert model.engine == "onnxruntime" and "; openvino is not installed (pip install openvino)\n" in text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("net.onnx", dict(engine="torch"), "--engine: torch needs a checkpoint"),
        ("net.pth", dict(fast=True, compile=True), "--fast: not with --compile"),
        ("net.onnx", dict(engine="auto", aipp_config="x"), "--engine: not with .*--aipp-config"),
        ("net.om", dict(fast=True), "--fast: chooses among engines of a CPU"),
    ],
)
def test_options_that_do_not_fit_are_errors(evaluate, name, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(name, **options)


def test_a_quantized_file_is_called_int8(files, tmp_path):
    proto = onnx.load(files / "net.onnx")
    found = onnx_header.read(files / "net.onnx")
    half = found._replace(inputs=[found.inputs[0]._replace(dtype="float16")])
    proto.graph.node.add(op_type="DequantizeLinear")
    onnx.save(proto, tmp_path / "int8.onnx")
    precisions = [
        engine_choice.precision_of(header) for header in (found, half, onnx_header.read(tmp_path / "int8.onnx"))
    ]
    assert precisions == ["float32", "float32", "int8"]  # what the export wrote, not the type of the input
    assert engine_choice.precision_of(half._replace(metadata={})) == "float16"


@pytest.mark.parametrize("engine", ["default", "onnxruntime", "openvino", "auto"])
def test_every_engine_names_the_precision_of_the_file(evaluate, files, engine):
    export.export(SPEC, export.ExportConfig(ckpt=f"{files}/net.pth", onnx=f"{files}/half.onnx", precision="float16"))
    _, model, text = evaluate("half.onnx", engine=engine)
    assert model.precision == "float16" and f" pixels, {model.engine} float16\n" in text


def test_a_data_set_without_validation_images_is_an_error(evaluate, images, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(images / "train")
    with pytest.raises(UserError, match=r"^--data: .*data has a train/ but no val/.*split_data.py"):
        evaluate("net.onnx", data=str(tmp_path / "data"))


@pytest.mark.parametrize("way", [None, "onnxruntime", [], ["onnxruntime", "float32"]])
def test_a_damaged_choice_is_measured_again(evaluate, speeds, monkeypatch, way):
    speeds["openvino float32"] = 99.0
    evaluate("net.onnx", engine="auto")
    read = engine_choice.cache.read
    monkeypatch.setattr(engine_choice.cache, "read", lambda *key: (dict(way=way, note=""), {}) if read(*key) else None)
    assert evaluate("net.onnx", engine="auto")[1].engine == "openvino"


def test_a_size_that_an_exported_file_does_not_take_is_an_error(evaluate):
    with pytest.raises(UserError, match=r"--image-size: 64, but .*net.onnx is fixed to images of 32 pixels"):
        evaluate("net.onnx", image_size=64)


def test_a_signal_after_openvino_ended_in_another_thread_does_not_kill_the_process(files, tmp_path):
    code = (
        "import gc, signal, subprocess, sys, threading, pathlib\n"
        "from common.evaluation.openvino_engine import OpenVinoEngine\n"
        "held = [OpenVinoEngine(pathlib.Path(sys.argv[1]), True, 2, 2)]\n"
        "thread = threading.Thread(target=lambda: (held.clear(), gc.collect()))\n"
        "thread.start(), thread.join()\n"
        "signal.signal(signal.SIGCHLD, lambda *_: print('handled', flush=True))\n"
        "subprocess.run(['true'])\n"
    )
    command, env = [sys.executable, "-c", code, str(files / "net.onnx")], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
