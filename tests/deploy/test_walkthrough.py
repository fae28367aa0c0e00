"""From weights and images to the accuracy of an OM file, for the models beside Inception v4, which has its own test.

The labels are placed at known ranks of torch's logits, so every path must count the same hits.
"""

import importlib

import numpy as np
import pytest
from support import ROOT, SIZE, calibrated, front_end_path, hits_printed, labels_at_ranks, run_ok, run_program

SMALL = ("--image-size", SIZE)
MODELS = {  # folder of the model: module of its spec, export command, options of eval.py, front end of ais_bench
    "inception_v3": (
        "inception_v3.spec",
        "pthtar2onnx.py --ckpt net.pth --onnx net.onnx",
        "--data data --resume",
        "2023",
    ),
    "xception": (
        "xception.src.config",
        "export.py --ckpt_file net.pth --file_name net --file_format ONNX",
        "--dataset_path data --checkpoint_path",
        "typer",
    ),
}


@pytest.fixture(params=MODELS)
def case(request, photos, fake_tools, tmp_path):
    """Folder with weights, images and labels; the scripts of a model; hits to expect; environment of the tools."""
    import torch

    module, export, evaluate, kind = MODELS[request.param]
    spec = importlib.import_module(module).SPEC
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val").symlink_to(photos)
    tmp_path.chmod(0o750)
    run = {"cwd": tmp_path, "env": fake_tools | {"PYTHONPATH": front_end_path(kind)}}
    prepare = (f"{request.param}/preprocess.py", "--src_path", "data/val", *SMALL, "--save_path")
    run_ok(*prepare, "prep_float32", cwd=tmp_path)
    run_ok(*prepare, "prep_uint8", "--dtype", "uint8", cwd=tmp_path)
    files = sorted((tmp_path / "prep_float32").glob("*.bin"))
    inputs = np.stack([np.fromfile(path, np.float32).reshape(3, SIZE, SIZE) for path in files])
    model = calibrated(1000, inputs, spec)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    with torch.inference_mode():
        logits = model(torch.from_numpy(inputs)).numpy()
    assert len(set(logits.argmax(axis=1))) > 15
    labels, hits = labels_at_ranks(logits, 0)
    names = sorted(path.name for path in photos.iterdir())
    lines = [f"{name} {label}\n" for name, label in zip(names, labels, strict=True)]
    (tmp_path / "data" / "val_label.txt").write_text("".join(lines))
    return request.param, export.split(), evaluate.split(), run, list(hits), tmp_path


def score(model, folder, run):
    arguments = ("--infer_results", folder, "--anno_file", "data/val_label.txt", "--metrics_json", "m.json")
    return hits_printed(run_ok(f"{model}/postprocess.py", *arguments, cwd=run["cwd"]))


def evaluated(model, evaluate, file, run):
    """Hits at top-1 and top-5 that eval.py counts; Xception's prints fractions."""
    device = ("--device_target", "cpu") if model == "xception" else ("--device", "cpu")
    size = SMALL if file.endswith(".pth") else ()
    out = run_program(ROOT / model / "eval.py", *evaluate, file, *device, *size, **run).stdout
    if model != "xception":
        return [hits_printed(out)[k] for k in (0, 4)]
    words = out[out.index("'Top_1_Acc'") :].replace("}", "").split()
    return [round(24 * float(words[k].strip(","))) for k in (1, 3)]


def test_weights_to_accuracy_of_an_om_file(case):
    model, export, evaluate, run, hits, folder = case
    top = [hits[0], hits[4]]
    run_ok(f"{model}/{export[0]}", *export[1:], *(("--width", SIZE) if model == "xception" else SMALL), cwd=folder)
    convert = ("tools/run_atc.py", "--model", "net.onnx", "--soc-version", "310P3")
    run_ok(*convert, "--batch", "5", **run)
    run_ok(*convert, "--batch", "8", "--aipp", **run)
    assert evaluated(model, evaluate, "net.pth", run) == evaluated(model, evaluate, "net_bs5.om", run) == top
    infer = ("tools/run_ais_bench.py", "--output", ".")
    run_ok(
        *infer, "--model", "net_bs5.om", "--input", "prep_float32", "--output_dirname", "a/", "--outfmt", "TXT", **run
    )
    assert score(model, "a", run) == hits
    run_ok(
        *infer,
        "--model",
        "net_uint8_bs8.om",
        "--input",
        "prep_uint8",
        "--output_dirname",
        "b",
        "--device",
        "0,1",
        **run,
    )
    pixels = score(model, "b", run)  # normalized in float16: near ties may change sides
    assert np.abs(np.array(pixels) - hits).max() <= 2
    assert evaluated(model, evaluate, "net_uint8_bs8.om", run) == [pixels[0], pixels[4]]
    emulated = ("--output", ".", "--output_dirname", "c", "--batchsize", 8, "--aipp_config", "net_aipp.cfg")
    run_ok("tools/run_onnx.py", "--model", "net.onnx", "--input", "prep_uint8", *emulated, cwd=folder)
    assert score(model, "c", run) == pixels
