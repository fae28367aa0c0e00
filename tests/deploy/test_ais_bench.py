"""run_ais_bench against the stand-in: the seed's walkthrough, both generations, and what the tool lets through."""

import json
import os
import pathlib

import numpy as np
import pytest
from support import NPU_SMI_310P, SIZE, fails, hits_printed, run_ok, run_script, write_pooling_onnx

SCRIPT = "tools/run_ais_bench.py"


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_walkthrough_with_all_six_batch_sizes(kind, chain, fake_tools, tmp_path):
    """The seed's chain, its options and its order, under the names of this repository."""
    case = chain[1001]
    (tmp_path / "info.txt").write_text(NPU_SMI_310P)
    env = fake_tools | {"FAKE_NPU_SMI": str(tmp_path)}
    run_ok(
        "inception_v4/preprocess.py",
        "--src_path",
        chain["photos"],
        "--save_path",
        "./prep_dataset",
        "--image-size",
        SIZE,
        "--dtype",
        kind,
        cwd=tmp_path,
    )
    os.link(case["onnx"], tmp_path / "inceptionv4.onnx")
    aipp = ["--aipp"] if kind == "uint8" else []
    sizes = [1, 4, 8, 16, 32, 64] if kind == "float32" else [4]
    run_ok(
        "tools/run_atc.py",
        "--model",
        "inceptionv4.onnx",
        "--batch",
        ",".join(map(str, sizes)),
        *aipp,
        cwd=tmp_path,
        env=env,
    )
    for bs in sizes:
        out = run_ok(
            SCRIPT,
            "--model",
            f"inceptionv4_bs{bs}.om",
            "--input",
            "./prep_dataset/",
            "--output",
            "./",
            "--output_dirname",
            f"./result_bs{bs}/",
            "--outfmt",
            "TXT",
            "--batchsize",
            bs,
            cwd=tmp_path,
            env=env,
        )
        assert f"filesperbatch:{bs} runcount:{-(-24 // bs)}" in out
        out = run_ok(
            "inception_v4/postprocess.py",
            "--infer_results",
            f"./result_bs{bs}/",
            "--anno_file",
            case["labels"],
            "--metrics_json",
            "metrics.json",
            cwd=tmp_path,
        )
        assert np.abs(np.array(hits_printed(out)) - case["hits"]).max() <= (0 if kind == "float32" else 2)


def test_sweep_prints_the_table_and_the_best(chain, fake_tools, tmp_path):
    (tmp_path / "m.json").write_text(
        json.dumps(
            {"value": [{"key": "Top1 accuracy", "value": "79.99%"}, {"key": "Top5 accuracy", "value": "94.86%"}]}
        )
    )
    write_pooling_onnx(tmp_path / "net.onnx")
    out = run_ok(
        SCRIPT,
        "--sweep",
        "1,4,8,16,32,64",
        "--model",
        "net.onnx",
        "--soc-version",
        "310P3",
        "--metrics-json",
        "m.json",
        cwd=tmp_path,
        env=fake_tools,
    )
    assert "| Ascend310P3 | 4 | ILSVRC2012 | Top1@Acc=79.99% Top5@Acc=94.86% | 1498.5 fps |" in out
    assert "| Ascend310P3 | 64 |" in out and "best: batch size 4, 1498.5 fps" in out
    assert "--loop 100" in out


@pytest.fixture
def ready(fake_tools, tmp_path):
    """A tiny OM of batch 4, six input files, and the environment."""
    write_pooling_onnx(tmp_path / "net.onnx")
    run_ok(
        "tools/run_atc.py", "--model", "net.onnx", "--batch", 4, "--soc-version", "310P3", cwd=tmp_path, env=fake_tools
    )
    (tmp_path / "in").mkdir(mode=0o750)
    rng = np.random.default_rng(0)
    for i in range(6):
        rng.normal(size=(3, SIZE, SIZE)).astype(np.float32).tofile(tmp_path / "in" / f"img_{i}.bin")
    return tmp_path


def bench(folder, fake_tools, *more, env=None, **options):
    given = {"--model": "net_bs4.om", "--input": "in", "--output": ".", "--output_dirname": "res", **options}
    words = [word for pair in given.items() if pair[1] is not None for word in pair]
    return run_script(SCRIPT, *words, *more, cwd=folder, env=fake_tools | (env or {}))


@pytest.mark.parametrize("generation", ["2023", "2026"])
@pytest.mark.parametrize("stop", ["", "sumary"])
@pytest.mark.parametrize("devices", ["0", "0,1"])
def test_all_generations_spellings_and_devices(generation, stop, devices, ready, fake_tools):
    done = bench(ready, fake_tools, "--device", devices, env={"FAKE_AIS": generation, "FAKE_AIS_STOP": stop})
    assert done.returncode == 0, done.stderr
    assert "hroughput 1000*batchsize.mean(4)/" in done.stdout


def test_only_what_was_asked_for_reaches_the_tool(ready, fake_tools):
    done = bench(ready, fake_tools, "--outfmt", "NPY", "--batchsize", 4, "--loop", 3)
    command = done.stdout.splitlines()[0].split()
    assert command[1:] == [
        "-m",
        "ais_bench",
        "--model",
        "net_bs4.om",
        "--input",
        "in",
        "--output",
        ".",
        "--output_dirname",
        "res",
        "--outfmt",
        "NPY",
        "--batchsize",
        "4",
        "--loop",
        "3",
    ]


def change_input(change):
    return lambda folder: change(folder / "in" / "img_2.bin")


def float64_npy(folder):
    for path in (folder / "in").iterdir():
        path.unlink()
    np.save(folder / "in" / "a.npy", np.zeros((3, SIZE, SIZE), np.int32))  # as many bytes as float32


def link(path):
    path.rename(path.parent.parent / "elsewhere.bin")
    path.symlink_to(path.parent.parent / "elsewhere.bin")


def earlier_run(folder):
    (folder / "res").mkdir()
    (folder / "res" / "old_0.txt").write_text("1.000000 ")


def group_writable(path):
    path.chmod(0o666)


BEFORE = {  # what the tool refuses late, or never
    "short file": (change_input(lambda path: path.write_bytes(b"123")), {}, ["img_2.bin holds 3 bytes", "67500"]),
    "npy of another type": (float64_npy, {}, ["a.npy holds int32", "float32"]),
    "link": (change_input(link), {}, ["img_2.bin is a symbolic link"]),
    "writable": (change_input(group_writable), {}, ["img_2.bin may be written by others", "chmod go-w"]),
    "characters": (change_input(lambda path: path.rename(path.with_name("a b.bin"))), {}, ["a b.bin", "refuses"]),
    "same result names": (change_input(lambda path: path.rename(path.with_name("img_1.x.bin"))), {}, ["img_1_0"]),
    "stale results": (earlier_run, {}, ["already holds files"]),
    "wrong batch size": (None, {"--batchsize": "8"}, ["--batchsize: 8", "built for 4"]),
    "batch 0": (None, {"--batchsize": "0"}, ["--batchsize: 0", "at least 1"]),
    "absolute dirname": (None, {"--output_dirname": "/res"}, ["--output-dirname: /res is absolute"]),
    "dirname without output": (None, {"--output": None}, ["--output-dirname: needs --output"]),
    "no model": (None, {"--model": "x.om"}, ["--model: x.om is no .om file"]),
    "no input": (None, {"--input": "nowhere"}, ["--input: nowhere does not exist"]),
    "empty input": (
        lambda folder: [path.unlink() for path in (folder / "in").iterdir()],
        {},
        ["no .bin or .npy files"],
    ),
    "device": (None, {"--device": "256"}, ["--device: 256"]),
}


@pytest.mark.parametrize("name", BEFORE)
def test_refused_before_the_tool_starts(name, ready, fake_tools):
    change, options, words = BEFORE[name]
    if change:
        change(ready)
    fails(bench(ready, fake_tools, **options), *words)
    assert not list(ready.glob("res/img*"))


def test_float_files_in_a_uint8_model_are_caught_though_the_tool_exits_0(ready, fake_tools):
    """The worst: byte counts divide, results are nonsense. Without notes on the OM file the tool's own line tells."""
    run_ok(
        "tools/run_atc.py",
        "--model",
        "net.onnx",
        "--batch",
        4,
        "--soc-version",
        "310P3",
        "--aipp",
        "--arch",
        "inception_v4",
        cwd=ready,
        env=fake_tools,
    )
    fails(bench(ready, fake_tools), "img_0.bin holds 67500 bytes", "uint8")
    (ready / "net_bs4.om.json").unlink()
    done = bench(ready, fake_tools)
    assert done.returncode == 2 and "took 1 files for a run of 4 images" in done.stderr
    assert len(list((ready / "res").glob("*"))) == 6


def test_wrong_batch_size_is_caught_without_notes(ready, fake_tools):
    (ready / "net_bs4.om.json").unlink()
    done = bench(ready, fake_tools, "--batchsize", 8)
    assert done.returncode == 2 and "the model was built for 4" in done.stderr


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ("midway", ["exit status 1", "[1][ACL:invalid parameter]", "incomplete"]),
        ("nosummary", ["without a summary", "incomplete"]),
    ],
)
def test_half_runs_are_failures(stop, words, ready, fake_tools):
    done = bench(ready, fake_tools, env={"FAKE_AIS_STOP": stop})
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ais_bench: ") and all(word in line for word in words)


def test_dynamic_batch_sizes_need_a_choice(ready, fake_tools):
    run_ok(
        "tools/run_atc.py",
        "--model",
        "net.onnx",
        "--dynamic-batch",
        "1,2,3",
        "--soc-version",
        "310P3",
        cwd=ready,
        env=fake_tools,
    )
    model = {"--model": "net_bs1-2-3.om"}
    fails(bench(ready, fake_tools, **model), "--dym-batch: missing", "built for 1,2,3")
    assert bench(ready, fake_tools, "--dym-batch", 2, **model).returncode == 0


def test_absent_or_another_package_of_that_name(ready, tmp_path):
    fails(bench(ready, {}), "ais_bench: not installed", "aclruntime", "run_onnx.py")
    other = tmp_path / "site" / "ais_bench" / "benchmark"
    other.mkdir(parents=True)
    (other.parent / "__init__.py").write_text("")
    fails(bench(ready, {"PYTHONPATH": str(tmp_path / "site")}), "another one", "language models")


def test_om_engine_of_eval(chain, fake_tools, tmp_path):
    """eval.py on an .om file: the tool's Python session, fixed batch, uint8 input."""
    run_ok(
        "tools/run_atc.py",
        "--model",
        chain[1001]["onnx"],
        "--output",
        tmp_path / "net",
        "--batch",
        "5",
        "--soc-version",
        "310P3",
        env=fake_tools,
    )
    out = run_ok(
        "inception_v4/eval.py", "--data", chain[1001]["data"], "--resume", tmp_path / "net_bs5.om", env=fake_tools
    )
    assert hits_printed(out) == list(chain[1001]["hits"])
    fails(
        run_script("inception_v4/eval.py", "--data", chain[1001]["data"], "--resume", tmp_path / "net_bs5.om"),
        "ais_bench: not installed",
    )
    assert pathlib.Path(tmp_path / "net_bs5.om.json").exists()
