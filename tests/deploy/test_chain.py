"""From checkpoint and images to the same accuracy on every path: files or stream, torch or ONNX Runtime, any format."""

import json

import numpy as np
import pytest
import real_chain
from support import REAL_DATA, SIZE, fails, hits_printed, plain_pixels, run_ok, run_script

from common.evaluation import aipp

REAL_IMAGES = REAL_DATA / "imagenet300"
SMALL = ("--image-size", SIZE)


@pytest.fixture(scope="module")
def prepared(chain):
    """Both kinds of input files of the photos."""
    folders = {}
    for dtype in ("float32", "uint8"):
        folders[dtype] = chain["folder"] / f"prep_{dtype}"
        run_ok(
            "inception_v4/preprocess.py",
            "--src_path",
            chain["photos"],
            "--save_path",
            folders[dtype],
            "--dtype",
            dtype,
            *SMALL,
        )
    return folders


@pytest.mark.parametrize(
    ("columns", "outfmt", "batch"), [(1001, "TXT", 1), (1001, "NPY", 7), (1000, "BIN", 4), (1000, "TXT", 8)]
)
def test_files_give_the_counts_placed_in_the_labels(columns, outfmt, batch, chain, prepared, tmp_path):
    case = chain[columns]
    out = run_ok(
        "tools/run_onnx.py",
        "--model",
        case["onnx"],
        "--input",
        prepared["float32"],
        "--output",
        tmp_path,
        "--output_dirname",
        "result",
        "--outfmt",
        outfmt,
        "--batchsize",
        batch,
        "--threads",
        1,
    )
    assert f"[INFO] throughput 1000*batchsize.mean({batch})/NPU_compute_time.mean(" in out
    assert len(list((tmp_path / "result").iterdir())) == 24  # the padding of the last batch is not saved
    out = run_ok(
        "inception_v4/postprocess.py",
        "--infer_results",
        tmp_path / "result",
        "--anno_file",
        case["labels"],
        "--metrics_json",
        tmp_path / "metrics.json",
    )
    assert hits_printed(out) == list(case["hits"])
    value = {item["key"]: item["value"] for item in json.loads((tmp_path / "metrics.json").read_text())["value"]}
    assert value["Number of classes"] == str(columns)
    assert value["Top1 accuracy"] == f"{100 * case['hits'][0] / 24:.2f}%"


@pytest.mark.parametrize(("columns", "engine"), [(1001, "torch"), (1000, "torch"), (1001, "onnx"), (1000, "onnx")])
def test_stream_gives_the_same_counts(columns, engine, chain, tmp_path):
    case = chain[columns]
    model = [case["onnx"]] if engine == "onnx" else [chain["ckpt"], "--num-classes", columns, *SMALL, "--device", "cpu"]
    out = run_ok(
        "inception_v4/eval.py",
        "--data",
        case["data"],
        "--resume",
        *model,
        "-b",
        5,
        "--threads",
        1,
        "--metrics-json",
        tmp_path / "m.json",
    )
    assert hits_printed(out) == list(case["hits"]) and "24 images" in out
    assert json.loads((tmp_path / "m.json").read_text())["value"][1]["value"] == str(columns)


def fp16_inputs(files, size=SIZE):
    """What AIPP hands to the network, written down a second time: float16 all the way."""
    pixels = np.stack([plain_pixels(path, size) for path in files]).astype(np.float16)
    return ((pixels - np.float16(127.5)) * np.float16(1 / 127.5)).astype(np.float32).transpose(0, 3, 1, 2)


def test_uint8_files_with_aipp_arithmetic(chain, prepared, tmp_path):
    """Normalizing in float16 moves a pixel by at most 2^-11 of its value, so only near ties may change sides."""
    import torch

    run_ok(
        "tools/run_atc.py",
        "--model",
        chain[1001]["onnx"],
        "--aipp",
        "--soc-version",
        "Ascend310P3",
        "--dry-run",
        cwd=tmp_path,
    )
    (config,) = tmp_path.glob("*_aipp.cfg")
    run_ok(
        "tools/run_onnx.py",
        "--model",
        chain[1001]["onnx"],
        "--input",
        prepared["uint8"],
        "--output",
        tmp_path,
        "--output_dirname",
        "result",
        "--outfmt",
        "NPY",
        "--batchsize",
        8,
        "--aipp_config",
        config,
        "--threads",
        1,
    )
    actual = np.concatenate(
        [np.load(tmp_path / "result" / f"{path.name.split('.')[0]}_0.npy") for path in chain["files"]]
    )
    inputs = fp16_inputs(chain["files"])
    assert 0 < np.abs(inputs - chain["inputs"]).max() <= 2**-11
    with torch.inference_mode():
        expected = chain["model"](torch.from_numpy(inputs)).numpy()
    assert np.abs(actual - expected).max() < 1e-3 * np.abs(expected).max()
    out = run_ok(
        "inception_v4/postprocess.py",
        "--infer_results",
        tmp_path / "result",
        "--anno_file",
        chain[1001]["labels"],
        "--metrics_json",
        tmp_path / "m.json",
    )
    streamed = run_ok(
        "inception_v4/eval.py", "--data", chain[1001]["data"], "--resume", chain[1001]["onnx"], "--aipp-config", config
    )
    assert hits_printed(streamed) == hits_printed(out)
    assert np.abs(np.array(hits_printed(out)) - chain[1001]["hits"]).max() <= 2


def test_float16_input_through_the_whole_chain(chain, fake_tools, tmp_path):
    """Rounding the inputs may change near ties, but files, stream and OM see the same rounded inputs."""
    small = ("--image-size", SIZE)
    run_ok(
        "inception_v4/pth2onnx.py",
        "--ckpt",
        chain["ckpt"],
        "--onnx",
        "half.onnx",
        "--input-dtype",
        "float16",
        *small,
        cwd=tmp_path,
    )
    half = ("--dtype", "float16")
    run_ok(
        "inception_v4/preprocess.py", "--src_path", chain["photos"], "--save_path", "prep", *half, *small, cwd=tmp_path
    )
    inference = ("--input", "prep", "--output", ".", "--outfmt", "BIN", "--batchsize", 5)
    run_ok("tools/run_onnx.py", "--model", "half.onnx", *inference, "--output_dirname", "onnx", cwd=tmp_path)
    tools = {"cwd": tmp_path, "env": fake_tools}
    run_ok("tools/run_atc.py", "--model", "half.onnx", "--batch", 5, "--soc-version", "310P3", **tools)
    (om,) = tmp_path.glob("*.om")
    assert json.loads((tmp_path / f"{om.name}.json").read_text())["dtype"] == "float16"
    run_ok("tools/run_ais_bench.py", "--model", om.name, *inference, "--output_dirname", "om", **tools)
    arguments = ("--anno_file", chain[1001]["labels"], "--metrics_json", tmp_path / "m.json")
    hits = [
        hits_printed(run_ok("inception_v4/postprocess.py", "--infer_results", tmp_path / name, *arguments))
        for name in ("onnx", "om")
    ]
    for model in ("half.onnx", om.name):
        hits.append(
            hits_printed(
                run_ok(
                    "inception_v4/eval.py",
                    "--data",
                    chain[1001]["data"],
                    "--resume",
                    tmp_path / model,
                    "-b",
                    5,
                    env=fake_tools,
                )
            )
        )
    assert all(each == hits[0] for each in hits)
    assert np.abs(np.array(hits[0]) - chain[1001]["hits"]).max() <= 2


@pytest.mark.realdata
@pytest.mark.parametrize(("columns", "size", "every"), [(1001, SIZE, 10), (1000, 107, 30)])
def test_real_photographs(columns, size, every, tmp_path):
    files = sorted((REAL_IMAGES / "val").iterdir())[::every][:-1]
    assert len(files) % 4 and len(files) % 8  # the last batch is padded
    placed, found = real_chain.chain(files, tmp_path, columns, size)
    assert placed[0] < placed[1] < placed[4] < len(files)
    for words, hits in found.items():
        assert np.abs(np.array(hits) - placed).max() <= (1 if "AIPP" in words else 0), f"{words}: {hits}, not {placed}"
    assert found["uint8 files, AIPP"] == found["eval.py, ONNX, AIPP"]


def test_summary_has_the_keys_of_ais_bench(chain, prepared, tmp_path):
    (tmp_path / "in").mkdir()
    files = [prepared["float32"] / f"ILSVRC2012_val_{i:08d}.bin" for i in (1, 2, 3)]
    run_ok(
        "tools/run_onnx.py",
        "--model",
        chain[1001]["onnx"],
        "--input",
        ",".join(map(str, files)),
        "--output",
        tmp_path,
        "--output_dirname",
        "./result/",
        "--outfmt",
        "TXT",
        "--batchsize",
        2,
        "--loop",
        2,
    )
    summary = json.loads((tmp_path / "result" / "_summary.json").read_text())  # a slash at the end puts it inside
    assert set(summary) == {
        "filesinfo",
        "args",
        "NPU_compute_time",
        "H2D_latency",
        "D2H_latency",
        "throughput",
        "npu_compute_time_list",
        "pid",
    }
    assert set(summary["NPU_compute_time"]) == {"min", "max", "mean", "median", "percentile(99%)", "count"}
    assert summary["NPU_compute_time"]["count"] == 4
    assert summary["filesinfo"]["2"] == {
        "infiles": [str(files[2])],
        "outfiles": [str(tmp_path / "result" / "ILSVRC2012_val_00000003_0.txt")],
    }
    assert summary["throughput"] == pytest.approx(2000 / summary["NPU_compute_time"]["mean"])
    text = (tmp_path / "result" / "ILSVRC2012_val_00000001_0.txt").read_text()
    assert text == "".join(f"{value:f} " for value in map(float, text.split())) + "\n" and len(text.split()) == 1001


def test_pure_inference(chain):
    out = run_ok(
        "tools/run_onnx.py", "--model", chain[1001]["onnx"], "--batchsize", 2, "--loop", 3, "--pure_data_type", "random"
    )
    assert "[INFO] throughput 1000*batchsize.mean(2)/" in out


RUN_ERRORS = {
    "files of another network": (["--input", "other"], ["other was made by inception_v3/preprocess.py, the model is "]),
    "uint8 files without aipp": (["--input", "uint8"], ["holds 16875 bytes", "67500", "--aipp-config"]),
    "float files with aipp": (["--input", "float32", "--aipp_config", "aipp"], ["holds 67500 bytes", "16875"]),
    "another size": (
        ["--image-size", "299"],
        ["--image-size: 299, but ", f"is fixed to images of {SIZE} pixels; leave"],
    ),
    "batch 0": (["--batchsize", "0"], ["--batchsize: 0", "at least 1"]),
    "no folder": (["--input", "nowhere"], ["--input", "does not exist"]),
    "no model": (["--model", "nowhere.onnx"], ["nowhere.onnx: does not exist"]),
    "no onnx": (["--model", "broken.onnx"], ["broken.onnx: ONNX Runtime cannot load it"]),
    "provider": (["--provider", "cann"], ["--provider: cann", "not in the installed ONNX Runtime"]),
    "stale": (["--input", "float32", "--output", ".", "--output_dirname", "old"], ["already holds files"]),
    "absolute": (["--input", "float32", "--output", ".", "--output_dirname", "/abs"], ["--output-dirname: /abs"]),
    "dirname alone": (["--output_dirname", "x"], ["--output-dirname: needs --output"]),
    "aipp file": (["--input", "uint8", "--aipp_config", "broken.onnx"], ["--aipp-config", "aipp_op"]),
}


@pytest.mark.parametrize("name", RUN_ERRORS)
def test_run_onnx_bad_input(name, chain, prepared, tmp_path):
    arguments, words = RUN_ERRORS[name]
    (tmp_path / "aipp").write_text(aipp.config_text((0.5,) * 3, (0.5,) * 3, SIZE))
    (tmp_path / "broken.onnx").write_text("<html>")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x_0.txt").write_text("1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.bin").touch()
    (tmp_path / "other" / "preprocess.json").write_text('{"model": "inception_v3"}')
    given = [prepared.get(word, word) for word in arguments]
    if "--model" not in given:
        given += ["--model", chain[1001]["onnx"]]
    fails(run_script("tools/run_onnx.py", *given, cwd=tmp_path), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aipp", "broken.onnx", "old", "other"]


def test_failed_run_leaves_no_results(chain, prepared, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted(prepared["float32"].glob("*.bin"))[:3]:
        np.save(folder / f"{path.stem}.npy", np.fromfile(path, np.float32))
    np.save(folder / "ILSVRC2012_val_00000003.npy", np.zeros(3 * SIZE * SIZE, np.int32))  # the right number of bytes
    done = run_script(
        "tools/run_onnx.py",
        "--model",
        chain[1001]["onnx"],
        "--input",
        folder,
        "--output",
        tmp_path,
        "--output_dirname",
        "result",
    )
    fails(done, "00000003.npy holds int32, the model takes float32")
    assert not (tmp_path / "result").exists() and not (tmp_path / "result_summary.json").exists()


def test_eval_bad_input(chain, tmp_path):
    fails(run_script("inception_v4/eval.py", "--data", chain[1001]["data"]), "--resume: missing")
    model = chain[1001]["onnx"]
    fails(run_script("inception_v4/eval.py", "--data", tmp_path / "x", "--resume", model), "--data")
    done = run_script("inception_v3/eval.py", "--data", chain[1001]["data"], "--resume", model)
    fails(done, f"{model}: holds inception_v4, this program is for inception_v3")
    done = run_script("inception_v4/eval.py", "--data", chain[1001]["data"], "--resume", model, "--compile")
    fails(done, f"--compile: {model} is no checkpoint")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.JPEG").write_bytes(b"no image")
    (tmp_path / "val_label.txt").write_text("a.JPEG 1\n")
    fails(
        run_script("inception_v4/eval.py", "--data", tmp_path, "--resume", chain[1001]["onnx"]),
        "a.JPEG",
        "does not decode",
    )
    (tmp_path / "val_label.txt").write_text("")
    fails(run_script("inception_v4/eval.py", "--data", tmp_path, "--resume", chain[1001]["onnx"]), "txt: no labels")
    (tmp_path / "val_label.txt").write_text("a.JPEG 1000\n")
    fails(
        run_script("inception_v4/eval.py", "--data", tmp_path, "--resume", chain[1001]["onnx"]),
        "val_label.txt: label 1000, the classes are 0..999",
        "if it counts from 1, give --label-numbers=from-1",
    )
