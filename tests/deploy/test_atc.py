"""run_atc against the stand-in: its commands, the chip, what is refused before and what becomes of atc's own messages."""

import json
import os

import onnx
import pytest
from onnx import helper
from support import NPU_SMI_310P, SIZE, fails, run_script, write_pooling_onnx

from common import files
from common.evaluation import onnx_metadata

SCRIPT = "tools/run_atc.py"
TABLE_A2 = """
| npu-smi 25.2.0                   Version: 25.2.0                                               |
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | Warning       | 94.6        36                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          37705/ 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 0       0                 | 310910        | python                   | 310                     |
"""
TABLE_A3 = """
| 0     Ascend910           | OK            | 172.6       52                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3119 / 65536         |
| 0     Ascend910           | OK            | -           54                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          2870 / 65536         |
"""
BOARD_A3 = """
        NPU ID                         : 0
        Chip ID                        : 0
        Chip Type                      : Ascend
        Chip Name                      : Ascend910
        NPU Name                       : 9392
"""
TABLE_310B = """
| 0       310B4     | Alarm           | 8.0          50                15   / 15             |
| 0       0         | NA              | 0            1400 / 7545                             |
"""
TABLE_950 = """
| 0     Ascend950PR         | OK            | 172.6       52                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3119 / 65536         |
"""
BOARD_950 = "  Chip Name : Ascend950PR\n  NPU Name : 9579\n"
EMPTY = "| NPU     Name      | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |\n"


@pytest.fixture
def work(tmp_path):
    write_pooling_onnx(tmp_path / "net.onnx")
    return tmp_path


@pytest.mark.parametrize(
    ("table", "board", "chip"),
    [
        (NPU_SMI_310P, "", "Ascend310P3"),
        (TABLE_A2, "", "Ascend910B3"),
        (TABLE_A3, BOARD_A3, "Ascend910_9392"),
        (TABLE_310B, "", "Ascend310B4"),
        (TABLE_950, BOARD_950, "Ascend950PR_9579"),
    ],
)
def test_chip_is_found_in_every_layout(table, board, chip, work, fake_tools):
    (work / "info.txt").write_text(table)
    (work / "board.txt").write_text(board)
    done = run_script(
        SCRIPT, "--model", "net.onnx", "--dry-run", cwd=work, env=fake_tools | {"FAKE_NPU_SMI": str(work)}
    )
    assert f"--soc_version={chip}" in done.stdout.split(), done.stderr


def test_no_card_no_driver_no_npu_smi(work, fake_tools):
    arguments = (SCRIPT, "--model", "net.onnx", "--dry-run")
    (work / "info.txt").write_text(EMPTY)
    fails(
        run_script(*arguments, cwd=work, env=fake_tools | {"FAKE_NPU_SMI": str(work)}),
        "shows no card",
        "--soc-version Ascend310P3",
    )
    (work / "info.txt").write_text(NPU_SMI_310P + TABLE_A2.replace("| 0     910", "| 2     910"))
    fails(
        run_script(*arguments, cwd=work, env=fake_tools | {"FAKE_NPU_SMI": str(work)}),
        "Ascend310P3, Ascend910B3",
        "choose one",
    )
    fails(run_script(*arguments, cwd=work, env=fake_tools), "ended with 1", "ret is -8005", "--soc-version")
    fails(run_script(*arguments, cwd=work, env={"PATH": "/nowhere"}), "no npu-smi", "--soc-version")


def test_dry_run_prints_the_documented_command(work):
    done = run_script(SCRIPT, "--model", "net.onnx", "--batch", "8", "--soc-version", "310P3", "--dry-run", cwd=work)
    assert done.stdout.strip() == (
        f"atc --framework=5 --model={work}/net.onnx --output={work}/net_bs8 --input_format=NCHW "
        f"--input_shape=image:8,3,{SIZE},{SIZE} --log=error --soc_version=Ascend310P3"
    )
    assert sorted(path.name for path in work.iterdir()) == ["net.onnx"]


def convert(work, fake_tools, *more, env=None):
    return run_script(
        SCRIPT, "--model", "net.onnx", "--soc-version", "Ascend310P3", *more, cwd=work, env=fake_tools | (env or {})
    )


def test_six_batch_sizes_in_one_command(work, fake_tools):
    done = convert(
        work,
        fake_tools,
        "--batch",
        "1,4,8,16,32,64",
        "--output",
        "out",
        "--output_type",
        "FP32",
        "--precision_mode",
        "force_fp32",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in work.glob("*.om")) == sorted(f"out_bs{n}.om" for n in (1, 4, 8, 16, 32, 64))
    assert "--output_type=FP32" in done.stdout and "--precision_mode=force_fp32" in done.stdout
    assert json.loads((work / "out_bs4.om.json").read_text())["batch"] == 4
    assert not (work / "fusion_result.json").exists() and not (work / "kernel_meta").exists()


def test_dynamic_batch_sizes_aipp_and_the_real_output_name(work, fake_tools):
    done = convert(
        work, fake_tools, "--dynamic_batch", "1,4,8", "--aipp", "--arch", "inception_v4", env={"FAKE_ATC_HOST": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "--dynamic_batch_size=1,4,8" in done.stdout and "--input_shape=image:-1,3," in done.stdout
    assert f"{work}/net_uint8_bs1-4-8_linux_x86_64.om: " in done.stdout
    text = (work / "net_aipp.cfg").read_text()
    assert "min_chn_0: 127.5" in text and "var_reci_chn_2: 0.0078431372549" in text and "mean_chn" not in text
    assert json.loads((work / "net_uint8_bs1-4-8_linux_x86_64.om.json").read_text())["dtype"] == "uint8"


def test_normalization_comes_from_the_file_itself(work, fake_tools):
    model = onnx.load(work / "net.onnx")
    helper.set_model_props(model, {"mean": "[0.485, 0.456, 0.406]", "std": "[0.229, 0.224, 0.225]"})
    onnx.save(model, work / "net.onnx")
    assert convert(work, fake_tools, "--aipp").returncode == 0
    text = (work / "net_aipp.cfg").read_text()  # the numbers of the ATC manual's own example
    for line in (
        "min_chn_0: 123.675",
        "min_chn_1: 116.28",
        "min_chn_2: 103.53",
        "var_reci_chn_0: 0.01712475383166",
        "var_reci_chn_1: 0.01750700280112",
        "var_reci_chn_2: 0.01742919389978",
    ):
        assert line in text


def contents(work):
    return {path.name: path.read_bytes() for path in work.iterdir() if path.suffix in (".om", ".cfg", ".json")}


def test_models_of_other_input_types_have_other_names(work, fake_tools):
    assert convert(work, fake_tools, "--batch", "1,4").returncode == 0
    before = contents(work)
    assert convert(work, fake_tools, "--batch", "1,4", "--aipp", "--arch", "inception_v4").returncode == 0
    write_pooling_onnx(work / "half.onnx", dtype="float16")
    assert convert(work, fake_tools, "--model", "half.onnx", "--output", "net", "--batch", "1,4").returncode == 0
    after = contents(work)
    assert {name: after[name] for name in before} == before
    expected = {"net": "float32", "net_uint8": "uint8", "net_float16": "float16"}
    for name, dtype in expected.items():
        assert json.loads(after[f"{name}_bs4.om.json"])["dtype"] == dtype


@pytest.mark.parametrize("env", [{}, {"FAKE_ATC_HOST": "1"}])
def test_a_model_whose_source_has_not_changed_is_kept(env, work, fake_tools):
    assert convert(work, fake_tools, "--batch", "1,4", env=env).returncode == 0
    before = contents(work)
    (work / ("net_bs4_linux_x86_64.om" if env else "net_bs4.om")).unlink()
    done = convert(work, fake_tools, "--batch", "1,4", "--log", "debug", env=env)
    assert done.returncode == 0, done.stderr
    assert "net_bs1.om: kept" in done.stdout.replace("_linux_x86_64", "") and done.stdout.count("atc --framework") == 1
    assert contents(work) == {**before, **{name: contents(work)[name] for name in before if "bs4" in name}}
    assert convert(work, fake_tools, "--batch", "1,4", env={**env, "FAKE_ATC_CODE": "EZ3003"}).returncode == 0


def test_a_model_is_replaced_when_its_source_changed(work, fake_tools):
    assert convert(work, fake_tools, "--batch", "4", "--aipp", "--arch", "inception_v4").returncode == 0
    os.utime(work / "net.onnx", ns=(0, 1))  # also where an older file took its place
    done = convert(work, fake_tools, "--batch", "4", "--aipp", "--arch", "inception_v4", "--output_type", "FP32")
    assert done.returncode == 0 and "kept" not in done.stdout
    assert "--output_type=FP32" in json.loads((work / "net_uint8_bs4.om.json").read_text())["command"]


def test_a_record_of_an_earlier_version_has_no_sources(work, fake_tools):
    assert convert(work, fake_tools, "--batch", "4").returncode == 0
    record = work / "net_bs4.om.json"
    old = {key: value for key, value in json.loads(record.read_text()).items() if key not in ("sources", "command")}
    record.write_text(json.dumps(old))
    fails(convert(work, fake_tools, "--batch", "4"), "net_bs4.om exists", "other options")
    os.utime(work / "net.onnx")
    assert convert(work, fake_tools, "--batch", "4").returncode == 0
    assert "sources" in json.loads(record.read_text())


def foreign(work):
    (work / "net_bs4.om").write_text("made by somebody else")


def replaced(work):
    """Replace ours by a file of other origin, newer than the record."""
    foreign(work)
    (work / "net_bs4.om.json").write_text('{"batch": 4}')
    os.utime(work / "net_bs4.om.json", ns=(0, 1))


KEPT_SAFE = {  # what is there before, arguments, words of the refusal
    "foreign": (foreign, [], ["net_bs4.om exists", "not made by run_atc.py", "--output"]),
    "record of another file": (replaced, [], ["net_bs4.om exists", "not made by run_atc.py"]),
    "other options": ("--precision-mode force_fp32", [], ["built with --precision_mode=force_fp32", "not changed"]),
    "other chip": ("--soc-version Ascend910B3", [], ["built with --soc_version=Ascend910B3"]),
    "other model": ("--model other.onnx --output net", [], ["other.onnx"]),
    "own AIPP file": (
        lambda work: (work / "net_aipp.cfg").write_text("aipp_op { aipp_mode: static }"),
        ["--aipp", "--arch", "inception_v4"],
        ["--aipp: ", "net_aipp.cfg exists with other content"],
    ),
    "AIPP file of another model": (
        "--aipp --arch inception_v3",
        ["--aipp", "--arch", "inception_v4"],
        ["net_aipp.cfg exists with other content"],
    ),
}


@pytest.mark.parametrize("name", KEPT_SAFE)
def test_what_run_atc_did_not_make_from_this_file_is_not_replaced(name, work, fake_tools):
    before, arguments, words = KEPT_SAFE[name]
    write_pooling_onnx(work / "other.onnx")
    if callable(before):
        before(work)
    else:
        assert convert(work, fake_tools, "--batch", "4", *before.split()).returncode == 0
    files = contents(work)
    for dry in ([], ["--dry-run"]):
        fails(convert(work, fake_tools, "--batch", "1,4", *arguments, *dry), *words)
    assert contents(work) == files  # the batch size 1 was not built either


@pytest.mark.parametrize(
    ("chip", "arguments", "option"),
    [
        ("310P3", ["--precision-mode", "force_fp32"], "--precision_mode=force_fp32"),
        ("310P3", ["--precision-mode", "cube_fp16in_fp32out"], "--precision_mode=cube_fp16in_fp32out"),
        ("310P3", ["--precision-mode-v2", "cube_fp16in_fp32out"], "--precision_mode_v2=cube_fp16in_fp32out"),
        ("310P3", ["--precision-mode", "mixed_float16"], "--precision_mode_v2=mixed_float16"),
        ("310P3", ["--precision_mode", "origin"], "--precision_mode_v2=origin"),
        ("910B3", ["--precision-mode", "allow_mix_precision_bf16"], "--precision_mode=allow_mix_precision_bf16"),
        ("910_9392", ["--precision-mode", "mixed_bfloat16"], "--precision_mode_v2=mixed_bfloat16"),
        ("950PR_9579", ["--precision-mode", "mixed_hif8"], "--precision_mode_v2=mixed_hif8"),
    ],
)
def test_every_mode_of_atc_by_one_option(chip, arguments, option, work):
    done = run_script(SCRIPT, "--model", "net.onnx", "--soc-version", chip, *arguments, "--dry-run", cwd=work)
    assert option in done.stdout.split() and done.stdout.count("--precision_mode") == 1, done.stderr


def test_layers_that_keep_float32(work, fake_tools):
    model = onnx.load(work / "net.onnx")
    model.graph.node[0].name = "/pool/GlobalAveragePool"
    onnx.save(model, work / "net.onnx")
    (work / "keep.cfg").write_text("/pool/GlobalAveragePool\nOpType::Softmax\n")
    done = convert(work, fake_tools, "--keep-dtype", "keep.cfg")
    assert f"--precision_mode=force_fp16 --keep_dtype={work}/keep.cfg" in done.stdout, done.stderr
    fails(
        convert(work, fake_tools, "--keep-dtype", "keep.cfg", "--precision-mode", "must_keep_origin_dtype"),
        "--keep-dtype: has no effect with --precision-mode must_keep_origin_dtype",
    )
    (work / "keep.cfg").write_text("/pool/AveragePool\n")
    fails(convert(work, fake_tools, "--keep-dtype", "keep.cfg"), "keep.cfg: /pool/AveragePool; expected names of nodes")
    fails(convert(work, fake_tools, "--keep-dtype", "no.cfg"), "--keep-dtype: no.cfg: ", "No such file")


REFUSED = {
    "bfloat16 on a chip without it": (
        ["--precision-mode", "mixed_bfloat16"],
        ["mixed_bfloat16 is not for Ascend310P3"],
    ),
    "bf16 of the older name": (
        ["--precision-mode", "allow_fp32_to_bf16"],
        ["allow_fp32_to_bf16 is not for Ascend310P3"],
    ),
    "hifloat8": (["--precision-mode-v2", "cube_hif8"], ["cube_hif8 is not for Ascend310P3"]),
    "batch 0": (["--batch", "0"], ["--batch: 0", "at least 1"]),
    "batch words": (["--batch", "1,x"], ["--batch: 1,x"]),
    "batch twice": (["--batch", "4,4"], ["--batch: 4,4", "twice"]),
    "both kinds": (["--batch", "1", "--dynamic-batch", "1,2"], ["--dynamic-batch", "not together with --batch"]),
    "one dynamic batch size": (["--dynamic-batch", "8"], ["--dynamic-batch: 1 numbers", "2 to 100"]),
    "too many dynamic batch sizes": (["--dynamic-batch", ",".join(map(str, range(1, 102)))], ["101 numbers"]),
    "dynamic batch size 0": (["--dynamic-batch", "0,1"], ["--dynamic-batch: 0,1"]),
    "dynamic batch size twice": (["--dynamic-batch", "2,2"], ["twice"]),
    "both precision modes": (["--precision-mode", "force_fp16", "--precision-mode-v2", "fp16"], ["not together"]),
    "precision mode": (["--precision-mode", "fp8"], ["--precision-mode: fp8", "force_fp16"]),
    "chip": (["--soc-version", "Ascend42"], ["--soc-version: Ascend42", "Ascend310P3"]),
    "output folder": (["--output", "no/such/x"], ["--output", "is not a folder"]),
    "characters": (["--output", "a b"], ["--output", "a b", "atc refuses"]),
    "no arch": (["--aipp"], ["--arch: missing"]),
    "wrong arch": (["--arch", "no_such_net"], ["--arch: no_such_net"]),
    "other size": (["--image-size", "300"], ["--image-size: 300, but net.onnx is fixed to images of"]),
    "no model": (["--model", "x.onnx"], ["--model: x.onnx does not exist"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_atc_starts(name, work, fake_tools):
    arguments, words = REFUSED[name]
    fails(convert(work, fake_tools, *arguments), *words)
    assert not list(work.glob("*.om"))


def test_what_the_file_says_of_itself_is_compared(work, fake_tools):
    proto = onnx.load(work / "net.onnx")
    metadata = onnx_metadata.OnnxMetadata(arch="inception_v3", mean=[0.5] * 3, std=[0.5] * 3)
    onnx.helper.set_model_props(proto, onnx_metadata.encode(metadata))
    onnx.save(proto, work / "net.onnx")
    fails(convert(work, fake_tools, "--arch", "xception"), "--arch: xception, but net.onnx holds inception_v3; leave")
    metadata["quantization"] = {"activations": "uint8"}
    onnx.helper.set_model_props(proto, onnx_metadata.encode(metadata))
    onnx.save(proto, work / "net.onnx")
    fails(convert(work, fake_tools), "net.onnx is an int8 file for CPUs", "tools/quantize.py --for om")
    assert not list(work.glob("*.om"))


BAD_FILES = {
    "opset": ({"opset": 19}, ["opset 19", "9 to 18", "--opset 11"]),
    "reduce mean of 18": ({"opset": 18, "extra": (helper.make_node("ReduceMean", ["image"], ["m"]),)}, ["ReduceMean"]),
    "input name": ({"name": "image:0"}, ["'image:0'", "rename"]),
    "two inputs": ({"inputs": 2}, ["2 inputs (image, other0)"]),
    "shape": ({"shape": ("N", 3)}, ["shape [None, 3]"]),
    "fixed batch": ({"shape": (16, 3, SIZE, SIZE)}, ["--batch: 8", "fixed to 16"]),
    "open size": ({"shape": ("N", 3, "H", "W")}, ["--image-size"]),
    "integers": ({"dtype": "int32"}, ["type INT32", "FLOAT or FLOAT16"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_file_that_atc_cannot_take(name, work, fake_tools):
    change, words = BAD_FILES[name]
    write_pooling_onnx(work / "net.onnx", **change)
    fails(convert(work, fake_tools, "--batch", "8"), *words)


def test_file_that_is_no_onnx(work, fake_tools):
    (work / "net.onnx").write_bytes(b"<html>")
    fails(convert(work, fake_tools), "net.onnx", "not an ONNX file")


def test_an_om_file_that_another_program_builds_is_left_alone(work, fake_tools):
    with files.claimed(work / "net_bs4.om", "--output"):
        done = run_script(
            SCRIPT, "--model=net.onnx", "--batch=4", "--soc-version=Ascend310P3", cwd=work, env=fake_tools
        )
    fails(done, "--output: ", "net_bs4.om is being written by another program")
    assert not (work / "net_bs4.om").exists()


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("E16002", "--opset 11"),
        ("E19010", "--opset 11"),
        ("EZ3003", "ops package"),
        ("E10501", "--opset 11"),
        ("E40000", "pip install"),
        ("E40024", "pip install decorator"),
        ("E89999", "E89999: op[Conv_0], runParams is null.; its log"),
    ],
)
def test_atcs_own_failure_is_passed_on(code, hint, work, fake_tools):
    done = convert(work, fake_tools, env={"FAKE_ATC_CODE": code, "HOME": str(work)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: atc: exit status 255, {code}: ") and hint in line
    assert f"{work}/ascend/log/debug/plog" in line


def test_atc_absent(work):
    fails(
        run_script(SCRIPT, "--model", "net.onnx", "--soc-version", "Ascend310P3", cwd=work, env={"PATH": "/nowhere"}),
        "atc: not on the PATH",
        "set_env.sh",
        "--dry-run",
    )


# Options that only the stand-in sees, because run_atc cannot produce them: they prove that it refuses as the table says.
DIRECT = [
    ("E10054", {"soc_version": None}),
    ("E10007", {"framework": "3"}),
    ("E10016", {"input_shape": "wrong:1,3,75,75"}),
    ("E10049", {"input_shape": "image:1,3"}),
    ("E10001", {"input_shape": "image:0,3,75,75"}),
    ("E10031", {"dynamic_batch_size": "1,2"}),
    ("E10018", {"dynamic_batch_size": "1,2", "input_shape": "image:-1,3,-1,75"}),
    ("E10040", {"dynamic_batch_size": "1,2", "input_shape": "image:-1,3,75~80,75"}),
    ("E10035", {"dynamic_batch_size": "1", "input_shape": "image:-1,3,75,75"}),
    ("E10039", {"dynamic_batch_size": "2,2", "input_shape": "image:-1,3,75,75"}),
    ("E10038", {"dynamic_batch_size": "0,2", "input_shape": "image:-1,3,75,75"}),
    ("E10009", {"dynamic_batch_size": "1,2", "dynamic_dims": "1;2", "input_shape": "image:-1,3,75,75"}),
    ("E10056", {"precision_mode": "force_fp16", "precision_mode_v2": "fp16"}),
]


@pytest.mark.parametrize(("code", "change"), DIRECT)
def test_stand_in_refuses_as_the_real_one(code, change, work):
    options = {
        "framework": "5",
        "model": str(work / "net.onnx"),
        "output": str(work / "x"),
        "soc_version": "Ascend310P3",
        "input_format": "NCHW",
        "input_shape": "image:1,3,75,75",
        **change,
    }
    done = run_script(
        "tests/fake_bin/atc.py", *(f"--{key}={value}" for key, value in options.items() if value), cwd=work
    )
    assert done.returncode == 255 and f"\n{code}: " in done.stdout and "ATC run failed" in done.stdout


CALIBRATION = (
    "calibration:\n{\n  input_data_dir: data.bin\n  input_shape: image:8,3,75,75\n  infer_soc: Ascend310P3\n}\n"
)


def test_compression_configuration_is_passed_on(work, fake_tools):
    (work / "int8.cfg").write_text(CALIBRATION)
    options = ["--model", work / "net.onnx", "--soc-version", "Ascend310P3", "--compression-optimize-conf", "int8.cfg"]
    done = run_script(SCRIPT, *options, cwd=work, env=fake_tools)
    assert f"--compression_optimize_conf={work}/int8.cfg" in done.stdout, done.stderr
    assert "kept" in run_script(SCRIPT, *options, cwd=work, env=fake_tools).stdout
    (work / "int8.cfg").write_text("enable_first_layer_quantization: true\n" + CALIBRATION)
    assert "kept" not in run_script(SCRIPT, *options, cwd=work, env=fake_tools).stdout


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        (None, [], ["int8.cfg", "No such file"]),
        ("batch: 1\n", [], ["neither calibration:"]),
        (CALIBRATION.replace("infer_soc", "log"), [], ["calibration needs infer_soc"]),
        (CALIBRATION, ["--precision-mode", "must_keep_origin_dtype"], ["must_keep_origin_dtype undoes"]),
        (CALIBRATION, ["--dynamic-batch", "1,4"], ["no dynamic batch; use --batch"]),
    ],
)
def test_compression_that_atc_would_refuse_or_ignore(text, more, words, work):
    if text:
        (work / "int8.cfg").write_text(text)
    options = ["--model", work / "net.onnx", "--soc-version", "Ascend310P3", "--compression-optimize-conf", "int8.cfg"]
    fails(run_script(SCRIPT, *options, "--dry-run", *more, cwd=work), "--compression-optimize-conf", *words)
