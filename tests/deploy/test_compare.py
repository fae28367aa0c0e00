"""tools/compare.py: counts of both sides, gates, each planted mistake named, and none for equal models."""

import csv
import dataclasses
import json
import re

import numpy as np
import onnx
import pytest
import tiny
import torch
from PIL import Image
from support import SIZE, fails, hits_printed, run_ok, run_script

from common import cli
from common.data.decode import open_rgb
from common.deploy import compare, diagnosis, export, reference_models
from common.errors import RunError, UserError
from common.evaluation.input_pipeline import InputPipeline
from common.evaluation.metrics import softmax
from common.spec import IMAGENET
from common.weights.load import load_model

SPEC = dataclasses.replace(
    tiny.SPEC,
    name="tiny_for_compare",
    eval_resize=39,  # (39 - 32) / 2: 4 rounded, 3 floored
    build_options={"num_classes": 10, "aux": False, "dropout": 0.5},
    classifiers=("fc",),
    training_modules=(),
)
CLASSES = 10
PIPELINE = InputPipeline.of(SPEC, 32)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Images (half of them with an EXIF rotation), a network whose logits differ between them, and its labels."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "data" / "val").mkdir(parents=True)
    rng = np.random.default_rng(3)
    for i in range(24):
        height, width = (int(side) for side in rng.integers(45, 80, 2))
        small = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8) * np.array([1, 0.7, 0.4])
        image = Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 2 else 1
        image.save(folder / "data" / "val" / f"{i:02d}.png", exif=exif)
    paths = sorted((folder / "data" / "val").iterdir())
    torch.manual_seed(5)
    model = SPEC.build(num_classes=CLASSES, aux=False, dropout=0.5)
    inputs = torch.from_numpy(inputs_of(PIPELINE, paths))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(inputs)
        model.eval()
        logits = model(inputs)
        model.fc.weight.mul_(3 / logits.std(0).mean())
        model.fc.bias.copy_(-(model(inputs) - model.fc.bias).mean(0))
    torch.save(model.state_dict(), folder / "net.pth")
    rows = logits_of(model, PIPELINE, paths)
    assert len(set(rows.argmax(axis=1))) >= 5
    labels = np.where(np.arange(24) % 3, rows.argmax(axis=1), (rows.argmax(axis=1) + 1) % CLASSES)
    write_labels(folder / "data", paths, labels)
    return dict(folder=folder, paths=paths, model=model, logits=rows, ckpt=str(folder / "net.pth"))


def write_labels(data, paths, labels):
    lines = [f"{path.name} {label}\n" for path, label in zip(paths, labels, strict=True)]
    (data / "val_label.txt").write_text("".join(lines))


def inputs_of(pipeline, paths):
    planes = np.empty((len(paths), 3, pipeline.size, pipeline.size), np.float32)
    for each, path in zip(planes, paths, strict=True):
        pipeline.normalize_into(each, pipeline.crop(open_rgb(path)))
    return planes


def logits_of(model, pipeline, paths):
    with torch.inference_mode():
        return model(torch.from_numpy(inputs_of(pipeline, paths))).numpy()


def write_results(folder, paths, rows):
    folder.mkdir()
    for path, row in zip(paths, rows, strict=True):
        np.save(folder / f"{path.stem}_0.npy", row[None])
    return str(folder)


def run(case, b, a=None, **options):
    """Options of compare -> --json's content."""
    target = case["folder"] / "out.json"
    target.unlink(missing_ok=True)
    config = compare.CompareConfig(
        data=str(case["folder"] / "data"), workers=0, num_classes=CLASSES, device="cpu", json=str(target), **options
    )
    compare.main(a or case["ckpt"], b, config, lambda path: SPEC)
    return json.loads(target.read_text())


MISTAKES = [
    ("color order: one side takes BGR, the other RGB", dict(colors="BGR")),
    ("normalization: one side takes values in -127.5", dict(mean=(0.5,) * 3, std=(1 / 255,) * 3)),
    ("normalization: one side takes Caffe's", dict(mean=(0.485, 0.458, 0.408), std=(1 / 255,) * 3)),
    ("normalization: one side takes ImageNet's mean without", dict(mean=IMAGENET[0], std=(1.0,) * 3)),
    ("normalization: one side takes ImageNet's std without", dict(mean=(0.0,) * 3, std=IMAGENET[1])),
    ("normalization: one side takes ImageNet's", dict(mean=IMAGENET[0], std=IMAGENET[1])),
    ("normalization: one side takes values in 0..255", dict(mean=(0.0,) * 3, std=(1 / 255,) * 3)),
    ("layout: HWC", dict(layout="HWC")),
    ("layout: height and width", dict(layout="CWH")),
    ("EXIF", dict(exif=True)),
    ("crop rounding", dict(rounding="floor")),
    ("crop: one side resizes to 32", dict(resize=32)),
    ("crop: one side squashes", dict(geometry="squash", resize=32)),
    ("interpolation: one side resizes by bicubic", dict(interpolation="bicubic")),
]


@pytest.mark.parametrize(("cause", "fields"), MISTAKES, ids=[cause for cause, _ in MISTAKES])
def test_a_mistake_in_the_input_of_results_is_named(cause, fields, case, tmp_path):
    rows = logits_of(case["model"], dataclasses.replace(PIPELINE, **fields), case["paths"])
    found = run(case, write_results(tmp_path / "result", case["paths"], rows))
    assert len(found["causes"]) == 1 and found["causes"][0].startswith(cause), found["causes"]


@pytest.mark.parametrize(
    ("cause", "change"),
    [
        ("column shift: B's columns come one later", lambda rows: np.roll(rows, 1, axis=1)),
        ("column shift: B's columns come one earlier", lambda rows: np.roll(rows, -1, axis=1)),
        ("class order: 9 of 10 columns", lambda rows: rows[:, [0, 9, 1, 8, 2, 7, 3, 5, 4, 6]]),
        ("class order: 2 of 10 columns", lambda rows: rows[:, [1, 0, *range(2, 10)]]),
    ],
)
def test_a_mistake_in_the_columns_is_named(cause, change, case, tmp_path, capsys):
    found = run(case, write_results(tmp_path / "result", case["paths"], change(case["logits"])))
    assert len(found["causes"]) == 1 and found["causes"][0].startswith(cause), found["causes"]
    assert "top-1 then agrees for 100.0 % instead of" in capsys.readouterr().out


def test_bgr_has_mean_and_std_in_either_order():
    pipeline = dataclasses.replace(PIPELINE, mean=IMAGENET[0], std=IMAGENET[1])
    found = {(each.mean, each.std) for cause, each in diagnosis._pipelines(pipeline, None) if "BGR" in cause}
    assert found == {tuple(IMAGENET), (IMAGENET[0][::-1], IMAGENET[1][::-1])}


@pytest.mark.parametrize(
    ("cause", "change"),
    [
        ("log-softmax: B gives", lambda rows: np.log(softmax(rows))),
        ("sigmoid: B gives", lambda rows: 1 / (1 + np.exp(-rows))),
        ("scale: B's logits are 0.5882 times A's", lambda rows: rows / 1.7),
        ("scale: B's logits are -1 times A's", lambda rows: -rows),
        ("constant: ", lambda rows: np.zeros_like(rows)),
    ],
)
def test_a_change_of_the_output_is_named(cause, change, case, tmp_path):
    results = write_results(tmp_path / "result", case["paths"], change(case["logits"]))
    found = run(case, results)
    assert len(found["causes"]) == 1 and found["causes"][0].startswith(cause), found["causes"]
    if cause == "constant: ":  # as A too, where the error is relative to zero
        assert run(case, case["ckpt"], a=results)["causes"][0].startswith(cause)


@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.parametrize("place", [0, CLASSES], ids=["first", "last"])
def test_an_additional_column_is_left_out_where_it_is(place, letter, case, tmp_path, capsys):
    result = write_results(tmp_path / "result", case["paths"], np.insert(case["logits"], place, -99, axis=1))
    target = tmp_path / "out.json"
    config = dict(data=str(case["folder"] / "data"), workers=0, device="cpu", num_classes=CLASSES + 1)
    models = (result, case["ckpt"]) if letter == "A" else (case["ckpt"], result)
    compare.main(*models, compare.CompareConfig(**config, json=str(target)), lambda path: SPEC)
    found = json.loads(target.read_text())
    assert found["agreed"] == 24 and found["causes"] is None and found["a"]["correct"] == found["b"]["correct"]
    note = f"note: {result} has a column more than {case['ckpt']}; its {'last' if place else 'first'} one is left out"
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("options", [dict(batch_size=8), dict(batch_size=5, sample=8)])
def test_a_forgotten_eval_is_named(case, tmp_path, options):
    """Each batch of 8 was normalized by its own statistics, whatever the batches and the sample of the comparison."""
    model = load_model(case["ckpt"], SPEC)[0]
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    rows = [logits_of(model, PIPELINE, case["paths"][i : i + 8]) for i in range(0, 24, 8)]
    result = write_results(tmp_path / "result", case["paths"], np.concatenate(rows))
    found = run(case, result, **options)
    assert len(found["causes"]) == 1 and found["causes"][0].startswith("train mode"), found["causes"]


def test_an_export_in_training_mode_is_named(case, tmp_path):
    model = load_model(case["ckpt"], SPEC)[0]
    path = tmp_path / "net.onnx"
    training = torch.onnx.TrainingMode.TRAINING
    torch.onnx.export(
        model, (torch.zeros(1, 3, 32, 32),), str(path), opset_version=13, dynamo=False, training=training,
        do_constant_folding=False, input_names=["image"], output_names=["class"],
        dynamic_axes={"image": {0: "batch"}, "class": {0: "batch"}},
    )  # fmt: skip
    (cause,) = run(case, str(path))["causes"]
    assert cause.startswith(f"train mode: {path} gives other logits for an image")


def test_a_mistake_that_concerns_one_image_of_many_is_named(case, tmp_path):
    """One upright image was turned by its EXIF orientation: it is in the sample because it differs most."""
    data = tmp_path / "data" / "val"
    data.mkdir(parents=True)
    for i, path in enumerate(case["paths"]):
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 5 else 1
        open_rgb(path).save(data / path.name, exif=exif)
    paths = sorted(data.iterdir())
    rows = logits_of(case["model"], dataclasses.replace(PIPELINE, exif=True), paths)
    assert (np.abs(rows - case["logits"]).max(axis=1) > 1e-3).tolist() == [i == 5 for i in range(24)]
    result = write_results(tmp_path / "result", paths, rows)
    target = tmp_path / "out.json"
    config = dict(data=str(data.parent), workers=0, num_classes=CLASSES, device="cpu", json=str(target), sample=8)
    write_labels(data.parent, paths, rows.argmax(axis=1))
    compare.main(case["ckpt"], result, compare.CompareConfig(**config), lambda path: SPEC)
    assert json.loads(target.read_text())["causes"] == ["EXIF: one side turns images upright by their EXIF orientation"]


def test_two_folders_of_results_and_probabilities(case, tmp_path):
    logits = write_results(tmp_path / "logits", case["paths"], case["logits"])
    exponentials = np.exp(case["logits"])
    rows = exponentials / exponentials.sum(axis=1, keepdims=True)
    found = run(case, write_results(tmp_path / "probabilities", case["paths"], rows), logits)
    assert found["causes"] == ["softmax: B gives probabilities, A logits"] and found["agreed"] == 24
    assert found["a"]["correct"] == found["b"]["correct"] and found["explained"]["error"] < 1e-5
    assert sorted(found["explained"]) == ["agreement", "agreement_before", "error", "error_before", "num_images"]
    with pytest.raises(UserError, match=f"^{tmp_path}/logits has no .txt, .npy or .bin results"):
        for path in (tmp_path / "logits").iterdir():
            path.unlink()
        run(case, case["ckpt"], logits)


def test_classes_in_another_order_are_compared_by_name(case, tmp_path, capsys):
    """Each side's accuracy is that of its own order, as eval.py has it."""
    model, order = load_model(case["ckpt"], SPEC)[0], [3, 0, 1, 2, *range(4, 10)]
    names = [f"n{i}" for i in range(CLASSES)]
    paths = []
    for name, columns in (("a", list(range(CLASSES))), ("b", order)):
        state = model.state_dict()
        state.update({key: state[key][columns] for key in ("fc.weight", "fc.bias")})
        content = dict(state_dict=state, build={"aux": False, "dropout": 0.5}, num_classes=CLASSES, image_size=32)
        torch.save({**content, "arch": SPEC.name, "classes": [names[k] for k in columns]}, tmp_path / f"{name}.pth.tar")
        paths.append(str(tmp_path / f"{name}.pth.tar"))
    found = run(case, paths[1], paths[0], label_numbers="from-0")
    assert found["agreed"] == 24 and found["a"]["correct"] == found["b"]["correct"] and found["causes"] is None
    assert "note: class order: B has the same class names in another order" in capsys.readouterr().out


def test_two_mistakes_at_once_are_named(case, tmp_path):
    pipeline = dataclasses.replace(PIPELINE, colors="BGR")
    rows = np.roll(logits_of(case["model"], pipeline, case["paths"]), 1, axis=1)
    found = run(case, write_results(tmp_path / "result", case["paths"], rows))
    assert sorted(cause.split(":")[0] for cause in found["causes"]) == ["color order", "column shift"]


def test_equal_models_and_small_errors_have_no_cause(case, tmp_path, capsys):
    noise = np.random.default_rng(0).normal(0, 0.2, case["logits"].shape).astype(np.float32)
    for name, rows in (("equal", case["logits"]), ("noisy", case["logits"] + noise)):
        found = run(case, write_results(tmp_path / name, case["paths"], rows))
        assert found["causes"] is None
    out = capsys.readouterr().out
    assert out.count("none of the known mistakes explains the difference") == 1  # of the noisy one
    assert "(16)" in out and "agreement of top-1: 100.000 % (24 of 24)" in out


@pytest.mark.parametrize(
    ("by", "cause"),
    [
        (1, "top-1 of A is 0.00 %, and 100.00 % if every label were one smaller; the file holds no label 0: if it"),
        (-1, "top-1 of A is 0.00 %, and 100.00 % if every label were one larger; the labels are too small by one"),
        (2, None),
    ],
)
def test_labels_that_are_off_by_one_are_a_cause(by, cause, case, tmp_path, capsys):
    """Of images whose class has a neighbor on that side; B has a mistake of its own besides."""
    best = case["logits"].argmax(axis=1)
    kept = (best + by >= 0) & (best + by < CLASSES)
    paths, data = [path for path, keep in zip(case["paths"], kept, strict=True) if keep], tmp_path / "data"
    (data / "val").mkdir(parents=True)
    for path in paths:
        (data / "val" / path.name).symlink_to(path)
    write_labels(data, paths, (best + by)[kept])
    rows = case["logits"][kept]
    target = tmp_path / "out.json"
    config = compare.CompareConfig(data=str(data), workers=0, device="cpu", num_classes=CLASSES, json=str(target))
    order = [0, 9, 1, 8, 2, 7, 3, 5, 4, 6]
    for name, columns, others in (("equal", list(range(CLASSES)), []), ("mixed", order, ["class order: 9 of 10"])):
        result = write_results(tmp_path / name, paths, rows[:, columns])
        compare.main(case["ckpt"], result, config, lambda path: SPEC)
        causes = json.loads(target.read_text())["causes"] or []
        expected = [f"label offset: {cause}"] * (cause is not None) + others
        assert [found[: len(start)] for found, start in zip(causes, expected, strict=True)] == expected
        assert all(f"cause: {found}" in capsys.readouterr().out for found in causes[:1])


def test_gates_end_with_one_line(case, tmp_path, capsys):
    rows = case["logits"].copy()
    rows[1] = np.roll(rows[1], 1)  # image 1 was right, and changes its class
    result = write_results(tmp_path / "result", case["paths"], rows)
    run(case, result, max_drop=4.2, min_agreement=95.8)  # one of 24 is 4.17 %
    with pytest.raises(RunError, match="^--max-drop: top-1 of B is 4.167 points below A's, allowed are 4"):
        run(case, result, max_drop=4.0)
    with pytest.raises(SystemExit) as end, cli.exit_on_error():
        run(case, result, max_drop=4.0)
    assert end.value.code == 1 and len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(RunError, match="^--min-agreement: top-1 agrees for 95.833 % of the images, asked for are 96 %"):
        run(case, result, min_agreement=96.0)


def test_changed_images_are_listed(case, tmp_path):
    rows = case["logits"].copy()
    rows[[1, 5]] = np.roll(rows[[1, 5]], 1, axis=1)
    run(case, write_results(tmp_path / "result", case["paths"], rows), changes=str(tmp_path / "changes.csv"))
    with open(tmp_path / "changes.csv", newline="") as file:
        changed = list(csv.DictReader(file))
    assert [row["path"] for row in changed] == [str(case["paths"][i]) for i in (1, 5)]
    best = [int(case["logits"][i].argmax()) for i in (1, 5)]
    assert [row["class_a"] for row in changed] == [f"class {k}" for k in best]
    assert [row["class_b"] for row in changed] == [f"class {(k + 1) % CLASSES}" for k in best]


def test_images_without_labels_are_compared_by_agreement_alone(case, tmp_path, capsys):
    config = compare.CompareConfig(
        data=str(case["folder"] / "data" / "val"), workers=0, device="cpu", num_classes=CLASSES, max_images=10
    )
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for path in case["paths"]:
        (tmp_path / "photos" / "deep" / path.name).symlink_to(path)
    config = dataclasses.replace(config, data=str(tmp_path / "photos"))
    result = write_results(tmp_path / "result", case["paths"], case["logits"])
    compare.main(case["ckpt"], result, config, lambda path: SPEC)
    out = capsys.readouterr().out
    assert "top-5" not in out and "(10 of 10)" in out
    named = write_results(tmp_path / "named", case["paths"], case["logits"])
    model, classes = load_model(case["ckpt"], SPEC)[0], [f"kind {k}" for k in range(CLASSES)]
    export.export_onnx(model, SPEC, tmp_path / "named.onnx", 32, classes=classes)
    for folder in (tmp_path / "photos", tmp_path / "photos" / "deep"):  # no folder is a class of the file
        compare.main(
            str(tmp_path / "named.onnx"), named, dataclasses.replace(config, data=str(folder)), lambda path: SPEC
        )
        assert "top-5" not in (out := capsys.readouterr().out) and "(10 of 10)" in out
        assert out.count("(deep, ...) are not the classes; its images have no labels") == (folder.name == "photos")
    with pytest.raises(UserError, match="^--max-drop: the images of --data have no labels"):
        compare.main(case["ckpt"], result, dataclasses.replace(config, max_drop=1.0), lambda path: SPEC)


def test_an_onnx_file_agrees_and_its_layers_do(case, tmp_path, capsys):
    path = tmp_path / "net.onnx"
    export.export_onnx(load_model(case["ckpt"], SPEC)[0], SPEC, path, 32)
    found = run(case, str(path), per_layer=True)
    assert found["causes"] is None and found["agreed"] == 24
    assert {"stem", "fc"} <= {layer["name"] for layer in found["layers"]}
    assert max(layer["error"] for layer in found["layers"]) < 1e-5
    assert "ms an image" in capsys.readouterr().out


def test_blocks_of_int8_and_float16_files_are_matched(case, tmp_path):
    """Quantization removes ReLU: the block's result is what the next one reads, clipped to its range."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        inputs = iter([inputs_of(PIPELINE, case["paths"])])

        def get_next(self):
            return next(({"image": each} for each in self.inputs), None)

    model, names = load_model(case["ckpt"], SPEC)[0], [tmp_path / f"{kind}.onnx" for kind in ("f32", "f16", "int8")]
    export.export_onnx(model, SPEC, names[0], 32, opset=13)
    export.export_onnx(model, SPEC, names[1], 32, opset=13, input_dtype="float16", precision="float16")
    quantize_static(names[0], names[2], Reader())
    for a, b, low, high in (
        (case["ckpt"], names[2], 1e-4, 0.1),
        (names[0], names[2], 1e-4, 0.1),
        (names[1], case["ckpt"], 1e-6, 1e-2),
    ):
        found = run(case, str(b), str(a), per_layer=True, diagnose=False)
        errors = {layer["name"]: layer["error"] for layer in found["layers"]}
        assert {"stem", "fc"} <= errors.keys() and low < min(errors.values()) <= max(errors.values()) < high, errors


def test_blocks_of_a_file_with_other_names_are_matched_by_values(case, tmp_path, capsys):
    """Names as another program gives them; in one file the last layer differs."""
    export.export_onnx(load_model(case["ckpt"], SPEC)[0], SPEC, tmp_path / "ours.onnx", 32)
    proto = onnx.load(tmp_path / "ours.onnx")
    inner = {node.output[0]: f"t{i}" for i, node in enumerate(proto.graph.node) if node.output[0] != "class"}
    for i, node in enumerate(proto.graph.node):
        node.name = f"node{i}"
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "theirs.onnx")
    for a, b in ((case["ckpt"], tmp_path / "theirs.onnx"), (tmp_path / "theirs.onnx", tmp_path / "ours.onnx")):
        errors = {layer["name"]: layer["error"] for layer in run(case, str(b), str(a), per_layer=True)["layers"]}
        assert max(errors.values()) < 1e-5
        assert any(name in errors for name in ("fc = class", "class = fc")) and any("stem" in name for name in errors)
        assert f"note: {b} has no blocks of the names of {a}; " in capsys.readouterr().out
    for tensor in proto.graph.initializer:
        if tensor.name == "fc.weight":
            tensor.CopyFrom(onnx.numpy_helper.from_array(1.2 * onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(proto, tmp_path / "theirs.onnx")
    layers = run(case, str(tmp_path / "theirs.onnx"), per_layer=True, diagnose=False)["layers"]
    assert max(layers, key=lambda each: each["error"])["name"] == "fc = class"


def test_a_block_that_differs_leads_the_list(case, tmp_path, capsys):
    model = load_model(case["ckpt"], SPEC)[0]
    with torch.no_grad():
        model.fc.weight.mul_(1.5)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    found = run(case, str(tmp_path / "other.pth"), per_layer=True)
    errors = {layer["name"]: layer["error"] for layer in found["layers"]}
    assert errors["stem"] == 0 and errors["fc"] > 0.1
    listed = capsys.readouterr().out.partition("block ")[2].splitlines()[1:]
    assert listed[0].startswith("fc ")


def test_the_program_prints_the_counts_of_eval(chain, tmp_path):
    """Inception v4 with a background column, as a checkpoint of 1001 and an ONNX file of 1000 columns."""
    small = ("--image-size", SIZE, "--workers", 0, "--device", "cpu")
    case = chain[1001]
    out = run_ok("tools/compare.py", chain["ckpt"], chain[1000]["onnx"], "--data", case["data"], *small)
    evaluated = run_ok("inception_v4/eval.py", "--data", case["data"], "--resume", chain["ckpt"], *small)
    counts = hits_printed(evaluated)
    assert re.findall(r"top-1 [\d.]+ % \((\d+)\), top-5 [\d.]+ % \((\d+)\)", out)[0] == (str(counts[0]), str(counts[4]))
    assert "agreement of top-1: 100.000 % (24 of 24)" in out and "cause" not in out


def test_a_reference_of_timm_has_its_own_transform(chain, monkeypatch):
    found = reference_models.load(f"timm:inception_v4={chain['ckpt']}")
    assert found.num_classes == 1001
    published = dict(size=299, resize=341, interpolation="bicubic", geometry="center")  # floor(299 / 0.875)
    assert {name: getattr(found.pipeline, name) for name in published} == published
    monkeypatch.setattr("timm.create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no route to host")))
    with pytest.raises(
        UserError, match="^timm:inception_v4: its weights cannot be downloaded .*timm:inception_v4=FILE"
    ):
        reference_models.load("timm:inception_v4")


def test_a_reference_of_torchvision_needs_no_auxiliary_head(tmp_path):
    from torchvision import models

    state = models.get_model("googlenet", weights=None, init_weights=False, num_classes=3).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("aux")}, tmp_path / "a.pth")
    assert reference_models.load(f"torchvision:googlenet={tmp_path}/a.pth").num_classes == 3
    torch.save({key: value for key, value in state.items() if not key.startswith("conv1")}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"b.pth does not fit \(\d names are missing, 0 unexpected, for example conv1"):
        reference_models.load(f"torchvision:googlenet={tmp_path}/b.pth")


def test_a_reference_beside_a_checkpoint(case, capsys, monkeypatch):
    """The same network under the transform of another package."""
    pipeline = dataclasses.replace(PIPELINE, interpolation="bicubic")
    reference = reference_models.Reference(case["model"], pipeline, CLASSES)
    monkeypatch.setattr(reference_models, "load", lambda argument: reference)
    found = run(case, "timm:tiny")
    assert found["causes"][0].startswith("interpolation: one side resizes by bilinear, the other by bicubic")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("missing.pth", "b.onnx"), "missing.pth: does not exist"),
        (("timm:no_such_model", "torchvision:nothing"), "timm:no_such_model: timm has no model no_such_model"),
        (("a.onnx",), "the following arguments are required: B"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(words, message, tmp_path):
    done = run_script("tools/compare.py", *words, "--data", tmp_path)
    fails(done, message)
