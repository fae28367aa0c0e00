"""run_ais_bench against the stand-ins: the documented walkthrough, every front end, and what they let through."""

import json
import os
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image
from support import (
    FRONT_ENDS,
    NPU_SMI_310P,
    SIZE,
    fails,
    front_end_path,
    hits_printed,
    run_ok,
    run_program,
    run_script,
    write_pooling_onnx,
)

from common.deploy import ais_bench, front_end
from common.errors import UserError
from common.evaluation import class_names, om_session, predictions

SCRIPT = "tools/run_ais_bench.py"


RUNS = (  # front end, batch sizes, output format, further options
    ("2023", "1", "TXT", ()),
    ("strict", "4", "NPY", ()),
    ("typer", "8", "BIN", ()),
    ("2023", "16", "BIN", ("--device", "0,1")),
    ("strict", "32", "TXT", ()),
    ("typer", "64", "NPY", ()),
    ("2023", "1-4-8", "NPY", ("--dym-batch", "8")),
    ("strict", "1-4-8", "BIN", ("--dym-batch", "4", "--device", "0,1")),
    ("typer", "1-4-8", "TXT", ("--dym-batch", "4", "--device", "0,2")),
)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_walkthrough_with_all_batch_sizes_on_every_front_end(dtype, chain, fake_tools, tmp_path):
    """The chain of the original README, its options and its order, with this repository's script names."""
    case = chain[1001]
    (tmp_path / "info.txt").write_text(NPU_SMI_310P)
    env = fake_tools | {"FAKE_NPU_SMI": str(tmp_path)}
    prepare = ("--src_path", chain["photos"], "--save_path", "./prep_dataset", "--image-size", SIZE, "--dtype", dtype)
    run_ok("inception_v4/preprocess.py", *prepare, cwd=tmp_path)
    os.link(case["onnx"], tmp_path / "inceptionv4.onnx")
    convert = ("tools/run_atc.py", "--model", "inceptionv4.onnx", *(["--aipp"] if dtype == "uint8" else []))
    runs = RUNS if dtype == "float32" else RUNS[2:4]
    run_ok(*convert, "--batch", "1,4,8,16,32,64", cwd=tmp_path, env=env)
    run_ok(*convert, "--dynamic-batch", "1,4,8", cwd=tmp_path, env=env)
    name = "inceptionv4" if dtype == "float32" else "inceptionv4_uint8"
    for kind, sizes, outfmt, more in runs:
        batch = int(dict([more[:2]])["--dym-batch"]) if "--dym-batch" in more else int(sizes)
        folder = f"./result_bs{sizes}_{kind}/"
        inference = ("--input", "./prep_dataset/", "--output", "./", "--output_dirname", folder, "--outfmt", outfmt)
        arguments = ("--model", f"{name}_bs{sizes}.om", *inference, "--batchsize", batch, *more)
        out = run_ok(SCRIPT, *arguments, cwd=tmp_path, env=env | {"PYTHONPATH": front_end_path(kind)})
        files = 12 if "--device" in more else 24
        assert f"filesperbatch:{batch} runcount:{-(-files // batch)}" in out
        score = ("--infer_results", folder, "--anno_file", case["labels"], "--metrics_json", "metrics.json")
        hits = hits_printed(run_ok("inception_v4/postprocess.py", *score, cwd=tmp_path))
        assert np.abs(np.array(hits) - case["hits"]).max() <= (0 if dtype == "float32" else 2), (kind, sizes, outfmt)


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


@pytest.fixture(scope="module")
def prepared(fake_tools, tmp_path_factory):
    """A tiny OM of batch 4 and six input files."""
    folder = tmp_path_factory.mktemp("prepared")
    write_pooling_onnx(folder / "net.onnx")
    convert(folder, fake_tools)
    (folder / "in").mkdir(mode=0o750)
    rng = np.random.default_rng(0)
    for i in range(6):
        rng.normal(size=(3, SIZE, SIZE)).astype(np.float32).tofile(folder / "in" / f"img_{i}.bin")
    return folder


@pytest.fixture
def ready(prepared, tmp_path):
    """A copy of these, with their times."""
    return shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)


def bench(folder, fake_tools, *more, env=None, **options):
    given = {"--model": "net_bs4.om", "--input": "in", "--output": ".", "--output_dirname": "res", **options}
    words = [word for pair in given.items() if pair[1] is not None for word in pair]
    return run_script(SCRIPT, *words, *more, cwd=folder, env=fake_tools | (env or {}))


@pytest.mark.parametrize("kind", FRONT_ENDS)
@pytest.mark.parametrize(("stop", "devices"), [("", "0"), ("", "0,3"), ("sumary", "0")])
def test_every_front_end_gives_every_image_one_result(kind, stop, devices, ready, fake_tools):
    """Option spellings, prefixes, the drawn table, summaries per device, input divided among them."""
    done = bench(
        ready,
        fake_tools,
        "--device",
        devices,
        "--outfmt",
        "NPY",
        "--warmup_count",
        2,
        env={"PYTHONPATH": front_end_path(kind), "FAKE_AIS_STOP": stop},
    )
    assert done.returncode == 0, done.stderr
    assert "hroughput 1000*batchsize.mean(4)/" in done.stdout and "warm up 2 done" in done.stdout
    written = sorted((ready / "res").rglob("*_0.npy"), key=lambda path: path.name)
    assert [path.name for path in written] == [f"img_{i}_0.npy" for i in range(6)]
    assert len({path.parent for path in written}) == (2 if "," in devices else 1)
    for i, path in enumerate(written):
        image = np.fromfile(ready / "in" / f"img_{i}.bin", np.float32).reshape(3, -1)
        np.testing.assert_allclose(np.load(path), image.mean(1)[None], atol=1e-6)


def test_options_are_spelled_as_the_front_end_has_them(ready, fake_tools):
    arguments = ("--device", "0,1", "--pure_data_type", "random", "--warmup_count", 3)
    words = (
        bench(ready, fake_tools, *arguments, env={"PYTHONPATH": front_end_path("typer")}).stdout.splitlines()[0].split()
    )
    assert words[-7:-1] == ["--warmup-count", "3", "--pure-data-type", "random", "--device", "0,1"]
    assert "--output-dirname" in words and words[-1] == "--divide-input"
    words = (
        bench(ready, fake_tools, *arguments, "--output_dirname", "x", env={"PYTHONPATH": front_end_path("strict")})
        .stdout.splitlines()[0]
        .split()
    )
    assert "--output_dirname" in words and words[-2:] == ["--divide_input", "1"] and "--warmup_count" in words


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


BEFORE = {  # what the tool refuses late, or never
    "short file": (change_input(lambda path: path.write_bytes(b"123")), {}, ["img_2.bin holds 3 bytes", "67500"]),
    "npy of another type": (float64_npy, {}, ["a.npy holds int32", "float32"]),
    "same result names": (change_input(lambda path: path.rename(path.with_name("img_1.x.bin"))), {}, ["img_1_0"]),
    "stale results": (earlier_run, {}, ["already holds files"]),
    "wrong batch size": (None, {"--batchsize": "8"}, ["--batchsize: 8", "built for 4"]),
    "batch 0": (None, {"--batchsize": "0"}, ["--batchsize: 0", "at least 1"]),
    "absolute dirname": (None, {"--output_dirname": "/res"}, ["--output-dirname: /res is absolute"]),
    "dirname without output": (None, {"--output": None}, ["--output-dirname: needs --output"]),
    "no model": (None, {"--model": "x.om"}, ["--model: x.om does not exist"]),
    "another file": (None, {"--model": "net.onnx"}, ["--model: net.onnx is no .om file"]),
    "no input": (None, {"--input": "nowhere"}, ["--input: nowhere does not exist"]),
    "empty input": (
        lambda folder: [path.unlink() for path in (folder / "in").iterdir()],
        {},
        ["no .bin or .npy files"],
    ),
    "device": (None, {"--device": "256"}, ["--device: 256"]),
    "more devices than files": (None, {"--device": "0,1,2,3,4,5,6"}, ["--device: ", "6 files", "use 6"]),
    "parts of equal size": (None, {"--device": "0,1,2,3"}, ["6 files over 4 devices", "use 3"]),
}


@pytest.mark.parametrize("name", BEFORE)
def test_refused_before_the_tool_starts(name, ready, fake_tools):
    change, options, words = BEFORE[name]
    if change:
        change(ready)
    fails(bench(ready, fake_tools, **options), *words)
    assert not list(ready.glob("res/img*"))


def with_entry(name, make=pathlib.Path.touch):
    return lambda folder: make(folder / "in" / name)


def linked_input(folder):
    (folder / "in").rename(folder / "elsewhere")
    (folder / "in").symlink_to(folder / "elsewhere")


def mode(name, bits):
    return lambda folder: (folder / name).chmod(bits)


STRICT = {  # what the front ends with path checks refuse, and the one of 2023 takes
    "link": (change_input(link), {}, ["img_2.bin is a symbolic link", "elsewhere.bin"]),
    "writable file": (mode("in/img_2.bin", 0o660), {}, ["img_2.bin may be written by others", "chmod go-w"]),
    "writable model": (mode("net_bs4.om", 0o664), {}, ["--model: net_bs4.om may be written by others"]),
    "writable folder": (mode("in", 0o770), {}, ["--input: in may be written by others"]),
    "linked folder": (linked_input, {}, ["--input: in is a symbolic link"]),
    "blank in a name": (change_input(lambda path: path.rename(path.with_name("a b.bin"))), {}, ["a b.bin", "refuses"]),
    "blank beside": (with_entry("read me.txt"), {}, ["read me.txt", "refuses"]),
    "writable beside": (with_entry("x.txt", lambda path: path.touch() or path.chmod(0o666)), {}, ["x.txt may be"]),
    "open parent": (mode(".", 0o755), {}, ["--output: ", "has permissions 0755", "at most 0750", "chmod 750"]),
    "dirname exists here": (
        lambda folder: [(folder / name).mkdir(mode=0o755) for name in ("res", "out")] and (folder / "out").chmod(0o750),
        {"--output": "out"},
        ["--output-dirname: ", "/res has permissions 0755"],
    ),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict_front_ends_are_spared_what_they_refuse(name, ready, monkeypatch):
    change, options, words = STRICT[name]
    change(ready)
    monkeypatch.chdir(ready)
    strict = front_end.FrontEnd(front_end.help_options(HELP), checks_paths=True)
    monkeypatch.setattr(front_end, "installed", lambda: strict)
    given = {"output": options.get("--output", "."), "output_dirname": "res"}
    with pytest.raises(UserError) as error:
        ais_bench.run(ais_bench.AisBenchConfig(model="net_bs4.om", input="in", **given))
    assert all(word in str(error.value) for word in words), error.value
    assert not list(ready.glob("*/res")) and not list(ready.glob("res/*"))


@pytest.mark.parametrize(
    ("count", "size", "words"),
    [(1025, 4, ["1025 files in the list", "takes 1024"]), (2, 2**32 + 1, ["4294967297 bytes", "takes 4294967296"])],
)
def test_limits_of_strict_front_ends(count, size, words, tmp_path):
    files = [tmp_path / f"{i}.bin" for i in range(count)]
    front_end.FrontEnd(frozenset(), checks_paths=False).check_inputs(",".join(map(str, files)), files, size)
    with pytest.raises(UserError) as error:
        front_end.FrontEnd(frozenset(), checks_paths=True).check_inputs(",".join(map(str, files)), files, size)
    assert all(word in str(error.value) for word in words), error.value


def test_the_front_end_of_2023_takes_what_the_strict_ones_refuse(ready, fake_tools):
    for name in ("link", "writable model", "writable folder", "blank beside", "writable beside", "open parent"):
        STRICT[name][0](ready)
    (ready / "in" / "img_5.bin").rename(ready / "in" / "img 5.bin")
    linked_input(ready)
    done = bench(ready, fake_tools)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["link", "writable model", "blank beside", "open parent", "dirname exists here"])
@pytest.mark.parametrize("kind", ["strict", "typer"])
def test_stand_ins_refuse_as_the_real_ones(kind, name, ready):
    change, options, _ = STRICT[name]
    change(ready)
    spelled = "--output-dirname" if kind == "typer" else "--output_dirname"
    words = ["--model", "net_bs4.om", "--input", "in", "--output", options.get("--output", "."), spelled, "res"]
    environment = {"PYTHONPATH": front_end_path(kind)}
    done = run_program(sys.executable, "-m", "ais_bench", *words, cwd=ready, check=None, env=environment)
    in_folder = name in ("link", "blank beside")  # found after the options were parsed
    assert done.returncode == (1 if kind == "typer" or in_folder else 2)
    assert ("[error] " if kind == "typer" and in_folder else "[ERROR] ") in done.stdout
    assert "is illegal" in done.stderr


def test_stand_in_of_typer_knows_its_own_spelling_only(ready, fake_tools):
    env = {"PYTHONPATH": front_end_path("typer")}
    done = run_program(sys.executable, "-m", "ais_bench", "--output_dirname", "x", check=2, env=env)
    assert "No such option: --output_dirname" in done.stderr
    narrow = run_program(sys.executable, "-m", "ais_bench", "--help", env=env | {"COLUMNS": "80"}).stdout
    assert "--output-dirn…" in narrow and "--output-dirname" not in narrow


def test_folders_that_are_created_are_closed_enough(ready, fake_tools):
    """With a umask that lets the group write."""
    ready.chmod(0o755)
    before = os.umask(0o002)
    try:
        (ready / "val").mkdir()
        Image.new("RGB", (90, 90)).save(ready / "val" / "a.JPEG")
        small = ("--image-size", SIZE)
        run_ok("inception_v4/preprocess.py", "--src_path", "val", "--save_path", "new/prep", *small, cwd=ready)
        (ready / "net_bs4.om").unlink()
        convert = ("--model", "net.onnx", "--batch", 4, "--soc-version", "310P3")
        run_ok("tools/run_atc.py", *convert, cwd=ready, env=fake_tools)
        done = bench(
            ready,
            fake_tools,
            **{"--input": "new/prep", "--output": "deep/er/out"},
            env={"PYTHONPATH": front_end_path("typer")},
        )
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    for name in ("deep", "deep/er", "deep/er/out", "deep/er/out/res", "new", "new/prep"):
        assert (ready / name).stat().st_mode & 0o777 == 0o750, name


HELP = """
usage: __main__.py [-h] --model MODEL [--output_dirname NAME]

options:
  -h, --help            show this help message and exit
  --model MODEL, -m MODEL
                        the path; such as --not_this
                        --nor_this one
  -o NAME, --output_dirname NAME  a name
Options:
  -l, --loop <str>                times
  --debug / --no-debug            Debug switch
╭─ Options ─────────────────────────────────────────────────────────────────────────────────────────╮
│ *  --input       -i                    <str>   a path, not --this  --one  [required]                │
│    --divide-all      --no-divide-all   <bool>  Divide, for                                          │
│                                                --device                                             │
│    --output-dirn…                      <str>   cut off                                              │
"""


def test_options_are_read_from_the_help_of_argparse_click_and_typer():
    assert front_end.help_options(HELP) == {
        "--help", "--model", "--output_dirname", "--loop", "--debug", "--no-debug", "--input", "--divide-all",
        "--no-divide-all",
    }  # fmt: skip


def convert(folder, fake_tools, *more):
    run_ok(
        "tools/run_atc.py",
        "--model",
        "net.onnx",
        "--batch",
        4,
        "--soc-version",
        "310P3",
        *more,
        cwd=folder,
        env=fake_tools,
    )


def forget(folder):
    """Make the OM one of other origin."""
    (folder / "net_bs4.om.json").unlink()


def stale(folder, **changes):
    """An OM of other origin took the place of ours; the record is wrong in all that it says."""
    path = folder / "net_bs4.om.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"batch": 8, "dtype": "uint8"} | changes))


def stale_time(folder):
    stale(folder)
    os.utime(folder / "net_bs4.om.json", ns=(0, (folder / "net_bs4.om").stat().st_mtime_ns - 1))


ORIGINS = {"no record": forget, "older record": stale_time, "other size": lambda folder: stale(folder, om_bytes=7)}


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_model_of_other_origin_is_asked_for_its_batch_size(origin, ready, fake_tools):
    ORIGINS[origin](ready)
    done = bench(ready, fake_tools, "--batchsize", 8)
    fails(done, "--batchsize: 8, but net_bs4.om was built for 4")
    assert ("net_bs4.om.json is " in done.stdout and "ignored" in done.stdout) == (origin != "no record")
    assert not (ready / "res").exists()
    assert bench(ready, fake_tools, "--batchsize", 4).returncode == 0


def test_input_files_of_another_network_are_refused(ready, fake_tools):
    record = ready / "net_bs4.om.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"arch": "inception_v3"}))
    (ready / "in" / "preprocess.json").write_text('{"model": "inception_v4"}')
    fails(bench(ready, fake_tools), "--input: in was made by inception_v4/preprocess.py, the model is inception_v3; ")


@pytest.mark.parametrize(("kind", "dtype"), [("2023", "float16"), ("strict", "uint8"), ("typer", "float16")])
def test_float32_files_in_a_model_of_smaller_input_are_refused(kind, dtype, ready, fake_tools):
    """The worst: byte counts divide, the tool exits with 0, and results are nonsense."""
    write_pooling_onnx(ready / "net.onnx", dtype="float16" if dtype == "float16" else "float32")
    convert(ready, fake_tools, "--output", "other", *(["--aipp", "--arch", "inception_v4"] if dtype == "uint8" else []))
    (om,) = ready.glob("other*.om")
    size = {"uint8": 16875, "float16": 33750}[dtype]
    env = {"PYTHONPATH": front_end_path(kind)}
    words = [
        "img_0.bin holds 67500 bytes",
        f"is {size} ({dtype} ",
        *(["3x75x75"] if dtype == "float16" else ["75x75x3"]),
    ]
    fails(bench(ready, fake_tools, **{"--model": om.name}, env=env), *words)
    (ready / f"{om.name}.json").unlink()
    fails(bench(ready, fake_tools, **{"--model": om.name}, env=env), *words)
    assert not (ready / "res").exists()
    for path in (ready / "in").iterdir():
        path.write_bytes(bytes(size))
    done = bench(ready, fake_tools, **{"--model": om.name}, env=env)
    assert done.returncode == 0 and "filesperbatch:4 " in done.stdout


def test_what_ais_bench_says_about_batches_is_a_second_check(monkeypatch):
    lines = "get filesperbatch files0 size:67500 tensor0size:67500 filesperbatch:1 runcount:6"
    with pytest.raises(UserError, match="took 1 files for a run of 4 images"):
        ais_bench._check_batching(lines, 4)
    with pytest.raises(UserError, match="--batchsize: 8, but the model was built for 4"):
        ais_bench._check_batching("[info] try get model batchsize:4", 8)


def test_a_model_that_cannot_be_loaded_is_one_line(ready, fake_tools):
    forget(ready)
    done = bench(ready, fake_tools, "--device", 3, env={"FAKE_ACL_DEVICES": "2"})
    fails(done, "--model: net_bs4.om on device 3: acl open device 3 failed", "npu-smi info")
    (ready / "net_bs4.om").write_bytes(b"torn")
    fails(bench(ready, fake_tools), "--model: net_bs4.om on device 0: load model from file failed", "damaged")


def description(shape, size, declared):
    """What InferSession.get_inputs gives."""
    datatype = types.SimpleNamespace(name=declared) if declared else 7
    return types.SimpleNamespace(name="image", shape=shape, size=size, realsize=size, datatype=datatype)


PIXELS = 3 * 75 * 75
FLOAT32 = {"input": "image", "batch": 4, "shape": [3, 75, 75], "dtype": "float32", "sample_bytes": 4 * PIXELS}
UINT8 = {**FLOAT32, "shape": [75, 75, 3], "dtype": "uint8", "sample_bytes": PIXELS}
DESCRIPTIONS = {
    "float32": (description([4, 3, 75, 75], 16 * PIXELS, "float32"), FLOAT32),
    "no type": (description([4, 3, 75, 75], 16 * PIXELS, ""), FLOAT32),
    "float16": (
        description([4, 3, 75, 75], 8 * PIXELS, "float16"),
        {**FLOAT32, "dtype": "float16", "sample_bytes": 2 * PIXELS},
    ),
    "aipp": (description([4, 75, 75, 3], 4 * PIXELS, "uint8"), UINT8),
    "aipp, declared as before it": (description([4, 3, 75, 75], 4 * PIXELS, "float32"), UINT8),
    "aipp of YUV": (
        description([4, 3, 80, 80], 4 * 9600, "uint8"),
        {"input": "image", "batch": 4, "shape": [3, 80, 80], "sample_bytes": 9600},
    ),
    "dynamic batch": (
        description([-1, 3, 75, 75], 8 * 4 * PIXELS, "float32"),
        {**{key: value for key, value in FLOAT32.items() if key != "batch"}, "largest_batch": 8},
    ),
    "dynamic size": (
        description([2, 3, -1, -1], 2 * 4 * 3 * 80 * 80, "float32"),
        {"input": "image", "batch": 2, "sample_bytes": 4 * 3 * 80 * 80},
    ),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_what_a_session_says(name):
    image, expected = DESCRIPTIONS[name]
    found = om_session.describe(types.SimpleNamespace(get_inputs=lambda: [image]))
    assert found == expected


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ("midway", ["exit status 1", "[1][ACL: invalid parameter]", "incomplete"]),
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
    (ready / "net_bs1-2-3.om.json").unlink()
    again = model | {"--output_dirname": "again"}
    fails(bench(ready, fake_tools, **again), "--dym-batch: missing", "several batch sizes, the largest is 3")
    fails(bench(ready, fake_tools, "--dym-batch", 4, **again), "--dym-batch: 4", "the largest is 3")
    fails(bench(ready, fake_tools, "--dym-batch", 2, "--batchsize", 3, **again), "--batchsize: 3")
    assert bench(ready, fake_tools, "--dym-batch", 2, **again).returncode == 0
    fails(
        bench(ready, fake_tools, "--dym-batch", 2, **{"--output_dirname": "x"}), "--dym-batch: 2", "fixed batch size 4"
    )


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
    words = ["--data", chain[1001]["data"], "--resume", tmp_path / "net_bs5.om", "--predictions", tmp_path / "p.csv"]
    out = run_ok("inception_v4/eval.py", *words, env=fake_tools)
    assert hits_printed(out) == list(chain[1001]["hits"])
    ranks = [row.rank for row in predictions.read(tmp_path / "p.csv")]
    assert [sum(rank in range(k) for rank in ranks) for k in range(1, 6)] == list(chain[1001]["hits"])
    words = [
        chain["ckpt"],
        tmp_path / "net_bs5.om",
        "--data",
        chain[1001]["data"],
        "--image-size",
        SIZE,
        "--workers",
        0,
    ]
    compared = run_ok("tools/compare.py", *words, "--device", "cpu", env=fake_tools)
    assert "agreement of top-1: 100.000 % (24 of 24)" in compared and "cause" not in compared
    top1, top5 = chain[1001]["hits"][0], chain[1001]["hits"][4]
    assert compared.count(f"% ({top1}), top-5") == 2 and compared.count(f"% ({top5}) of 24 images") == 2
    named = run_ok("inception_v4/demo.py", chain["files"][0], "--resume", tmp_path / "net_bs5.om", env=fake_tools)
    best = int(chain["logits"][0, 1:].argmax())
    first = next(line for line in named.splitlines() if " %  " in line)
    assert first.endswith(f" %  {class_names.names(None, 1000)[best]}")
    fails(
        run_script("inception_v4/eval.py", "--data", chain[1001]["data"], "--resume", tmp_path / "net_bs5.om"),
        "ais_bench: not installed",
    )
    other = run_script("inception_v3/eval.py", "--data", chain[1001]["data"], "--resume", tmp_path / "net_bs5.om")
    fails(other, "net_bs5.om: holds inception_v4, this program is for inception_v3")
    assert pathlib.Path(tmp_path / "net_bs5.om.json").exists()
