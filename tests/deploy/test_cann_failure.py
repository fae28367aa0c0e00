"""The cause of a failure in recorded output of atc and of three front ends of ais_bench."""

import pytest
from support import fails, run_ok, run_script

from common.device import cann_failure

RICH = """\
╭───────────────────── Traceback (most recent call last) ──────────────────────╮
│   130 │   │   │   logger.error("arg0 tensorsize: {} filesize: {} not         │
│ ❱ 131 │   │   │   raise RuntimeError()                                       │
╰──────────────────────────────────────────────────────────────────────────────╯
"""
# output, beginning of the line, words of what to do
ATC = {
    "code": (
        "ATC start working now, please wait for a moment.\n...\n"
        "ATC run failed, Please check the detail log, Try 'atc --help' for more information\n"
        "E10007: [PID: 10490] 2025-03-18-09:02:18.501.341 [--framework] is required. The value must be [5(Onnx)].\n",
        "E10007: [--framework] is required. The value must be [5(Onnx)].",
        "",
    ),
    "inner error, process id": (
        "ATC run failed, Please check the detail log\nE89999: Inner Error!\n"
        "E89999: [PID: 491533] 2024-12-31-15:35:08.619.694 op[GridSampler3D75], runParams is null."
        "[FUNC:Tiling4GridSampler3D][FILE:grid_sampler_3d.cc][LINE:157]\n"
        "        TraceBack (most recent call last):\n       [Exec][Op]Execute op failed.[FUNC:ReportCallError]\n",
        "E89999: op[GridSampler3D75], runParams is null.",
        "",
    ),
    "inner error, code twice": (
        "E89999: Inner Error!\nE89999[PID: 47155] 2025-12-25-07:48:39.874.850 (E89999): the first dim is wrong"
        "[FUNC:Check][FILE:x.cpp][LINE:1]\n",
        "E89999: the first dim is wrong",
        "",
    ),
    "inner error, no date": (
        "EZ9999: Inner Error!\nEZ9999  [InferShape] The k-axis of a(64) and b(9216) tensors must be the same"
        "[FUNC:InferShape][FILE:m.cc][LINE:1402]\n        TraceBack (most recent call last):\n",
        "EZ9999: [InferShape] The k-axis of a(64) and b(9216) tensors must be the same",
        "",
    ),
    "inner error, indented": (
        "EH9999: Inner Error!\n        rtDeviceSynchronize execute failed, reason=[vector core exception]"
        "[FUNC:FuncErrorReason][FILE:error_message_manage.cc][LINE:53]\n",
        "EH9999: rtDeviceSynchronize execute failed, reason=[vector core exception]",
        "",
    ),
    "title": (
        "[PID: 7] 2026-05-01-10:00:00.000.000 Invalid_Argument(E10001): Value 7 for parameter x is invalid.\n",
        "E10001: Value 7 for parameter x is invalid.",
        "",
    ),
    "a missing Python module": (
        "E40024: [PID: 7] 2025-07-08-10:25:28.680.962 Failed call Python Func/Meathod [get_binfile_sha256_hash_from_c], "
        "Reason[ModuleNotFoundError: No module named 'decorator']\n",
        "E40024: Failed call Python Func/Meathod",
        "`python3 -m pip install decorator`",
    ),
    "E40024 of another cause": (
        "E40024: Failed call Python Func\n",
        "E40024: Failed call",
        "python3 -m pip install deco",
    ),
    "NumPy 2": (
        "EC0010: [PID: 7] 2025-07-08-10:25:28.680.962 Failed to import Python module "
        "[AttributeError: `np.float_` was removed in the NumPy 2.0 release. Use `np.float64` instead..].\n",
        "EC0010: Failed to import Python module [AttributeError: `np.float_` was removed",
        "'numpy<2'",
    ),
    "ops package": (
        "EZ3003: No supported Ops kernel and engine are found for [Conv_0], optype [Conv2D].\n        Possible Cause: x\n",
        "EZ3003: No supported Ops kernel and engine are found for [Conv_0]",
        "ops package",
    ),
    "no driver": (
        "/usr/local/Ascend/cann/x86_64-linux/bin/atc.bin: error while loading shared libraries: libascend_hal.so: "
        "cannot open shared object file: No such file or directory\n",
        "libascend_hal.so: cannot open shared object file",
        "devlib",
    ),
    "log lines alone": (
        "[ERROR] AMCT(21177,atc.bin):2023-04-14-14:43:17[utils_acl.cpp:133]input image size[1] is not equal to 2\n"
        "[ERROR] AMCT(21177,atc.bin):2023-04-14-14:43:20[graph.cpp:78]Failed to execute.\n...\n"
        "ATC run failed, Please check the detail log, Try 'atc --help' for more information\n",
        "AMCT(21177,atc.bin):2023-04-14-14:43:17[utils_acl.cpp:133]input image size[1] is not equal to 2",
        "",
    ),
    "nothing": ("", "nothing was printed", ""),
}
NO_DEVICE = "[INFO] acl init success\n[ERROR] acl open device 9 failed\n"
AIS_BENCH = {
    "device, 2023": (
        f"{NO_DEVICE}Traceback (most recent call last):\n  File\n    raise x\nRuntimeError: [107001][Error code unknown] \n",
        "acl open device 9 failed",
        "npu-smi info",
    ),
    "device, typer": (
        f"{NO_DEVICE}{RICH}RuntimeError: [107001][Error code unknown] \n",
        "acl open device 9 failed",
        "npu-smi info",
    ),
    "sizes": (
        "[error] arg0 tensorsize: 270000 filesize: 7 not match\n" + RICH + "RuntimeError\n[INFO] end to finalize acl\n",
        "arg0 tensorsize: 270000 filesize: 7 not match",
        "preprocess.py",
    ),
    "dynamic batch, 2026": (
        RICH + "RuntimeError: dynamic batch om model detected, but dymbatch, dymdims or dymshape\nnot set!\n"
        "[INFO] unload model success, model Id is 1\n",
        "RuntimeError: dynamic batch om model detected, but dymbatch, dymdims or dymshape not set!; ",
        "--dym-batch",
    ),
    "fixed batch": (
        "[ERROR] the dynamic_batch_size parameter is not specified for model conversion\nRuntimeError: [1][x] \n",
        "the dynamic_batch_size parameter is not specified",
        "leave out --dym-batch",
    ),
    "another dynamic batch": (
        "[ERROR] the dymBatch parameter is not correct\nRuntimeError: [1][x] \n",
        "the dymBatch parameter is not correct",
        "one of the batch sizes",
    ),
    "damaged": (
        "[ERROR] load model from file failed, model file is bad.om\nRuntimeError: [1][ACL: invalid parameter] \n",
        "load model from file failed, model file is bad.om",
        "run_atc.py",
    ),
    "aclruntime": (
        "Traceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'aclruntime'\n",
        "ModuleNotFoundError: No module named 'aclruntime'",
        "aisbench.obs.myhuaweicloud.com",
    ),
    "another module": (
        "ModuleNotFoundError: No module named 'tabulate'\n",
        "ModuleNotFoundError: No module named 'tabulate'",
        "`pip install tabulate`",
    ),
    "libascendcl": (
        "ImportError: libascendcl.so: cannot open shared object file: No such file or directory\n",
        "ImportError: libascendcl.so: cannot open shared object file",
        "set_env.sh",
    ),
    "driver": (
        "ImportError: libascend_hal.so: cannot open shared object file: No such file or directory\n",
        "ImportError: libascend_hal.so",
        "install the driver",
    ),
    "the first of two exceptions": (
        "ValueError: the cause\n\nDuring handling of the above exception, another exception occurred:\n\nRuntimeError: x\n",
        "ValueError: the cause",
        "",
    ),
    "argparse": (
        "usage: __main__.py [-h]\n__main__.py: error: argument --model/-m: om path:link.om is illegal.\n",
        "__main__.py: error: argument --model/-m: om path:link.om is illegal.",
        "",
    ),
    "on the device": (
        "[INFO] load model x success\nEZ9999: Inner Error!\nEZ9999  The error from device(2) is an aicore error"
        "[FUNC:PrintCoreErrorInfo]\nRuntimeError: [507011][x]\n",
        "EZ9999: The error from device(2) is an aicore error",
        "",
    ),
}


@pytest.mark.parametrize("name", [*ATC, *AIS_BENCH])
def test_the_first_line_that_says_why_and_what_to_do(name):
    output, begin, remedy = {**ATC, **AIS_BENCH}[name]
    line = cann_failure.explain(output, is_converter=name in ATC)
    assert line.startswith(begin) and "\n" not in line and "[FUNC" not in line
    assert (remedy in line) if remedy else ";" not in line


@pytest.fixture(scope="module")
def om(chain, fake_tools, tmp_path_factory):
    """Folder of OM files: batch 5, batch 1 or 4, damaged, a link to the damaged one."""
    folder = tmp_path_factory.mktemp("om")
    arguments = ["--model", chain[1001]["onnx"], "--output", folder / "net", "--soc-version", "310P3"]
    run_ok("tools/run_atc.py", *arguments, "--batch", "5", env=fake_tools)
    run_ok("tools/run_atc.py", *arguments, "--dynamic-batch", "1,4", env=fake_tools)
    (folder / "damaged.om").write_bytes(b"\0\1")
    (folder / "link.om").symlink_to("damaged.om")
    return folder


@pytest.mark.parametrize(
    ("file", "device", "words"),
    [
        ("net_bs5.om", 300, ["--device-id: 300"]),
        ("net_bs5.om", 9, ["net_bs5.om on device 9: acl open device 9 failed", "npu-smi info"]),
        ("damaged.om", 0, ["load model from file failed", "damaged.om", "tools/run_atc.py"]),
        ("link.om", 0, ["link.om on device 0: load model from file failed", "damaged.om"]),
        ("net_bs1-4.om", 0, ["input shape [-1, ", "--dym-batch"]),
    ],
)
def test_eval_on_an_om_file_ends_with_one_line(file, device, words, om, chain, fake_tools):
    arguments = ["--data", chain[1001]["data"], "--resume", om / file, "--device-id", device]
    fails(run_script("inception_v4/eval.py", *arguments, env=fake_tools), *words)


@pytest.mark.parametrize("reason", ["No module named 'aclruntime'", "libascendcl.so: cannot open shared object file"])
def test_eval_without_aclruntime_or_its_library(reason, om, chain, tmp_path):
    package = tmp_path / "site" / "ais_bench" / "infer"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "interface.py").write_text(f"raise ImportError({reason!r})")
    arguments = ["--data", chain[1001]["data"], "--resume", om / "net_bs5.om"]
    done = run_script("inception_v4/eval.py", *arguments, env={"PYTHONPATH": str(tmp_path / "site")})
    fails(done, f"ais_bench: installed, but it does not start: {reason}; ", "set_env.sh")
