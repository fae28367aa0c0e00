"""Stands in for CANN's atc: same words, codes and exit status for what the real one refuses; the OM file is JSON.

The refusals are the rows of REFUSALS, in the order the real program checks. FAKE_ATC_CODE=EZ3003 makes it fail with
that code after its checks; FAKE_ATC_HOST=1 gives the OM file the platform suffix of models with host code.
"""

import json
import os
import pathlib
import re
import sys

import onnx

MODES = (
    "force_fp16 force_fp32 cube_fp16in_fp32out allow_fp32_to_fp16 must_keep_origin_dtype allow_mix_precision "
    "allow_mix_precision_fp16 allow_mix_precision_bf16 allow_fp32_to_bf16"
).split()
KNOWN = set(
    "framework model output soc_version input_format input_shape input_shape_range dynamic_batch_size "
    "dynamic_image_size dynamic_dims insert_op_conf precision_mode precision_mode_v2 keep_dtype output_type log "
    "compression_optimize_conf".split()
)
LATER = {  # what only fails inside the compiler
    "E16002": "No ONNX parser is registered for optype ai.onnx::19::Conv.",
    "EZ3003": "No supported Ops kernel and engine are found for [Conv_0], optype [Conv2D].",
    "E10501": "IR for Op [Foo_1] optype [Foo], is not registered.",
    "E40000": "Failed to import the Python module [No module named 'decorator'].",
    "E40024": "[PID: 7] 2026-01-01-00:00:00.000.000 Failed call Python Func/Meathod [f], Reason[ModuleNotFoundError: "
    "No module named 'decorator']",
    "E89999": "Inner Error!\nE89999: [PID: 7] 2026-01-01-00:00:00.000.000 op[Conv_0], runParams is null."
    "[FUNC:Tiling][FILE:conv.cc][LINE:157]",
    "E19010": "No parser is registered for Op [Div_3, optype [ai.onnx::23::Div]].",
}


def model_facts(path):
    proto = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = {
        value.name: [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
        for value in proto.graph.input
        if value.name not in weights
    }
    return inputs, {entry.domain: entry.version for entry in proto.opset_import}[""]


def shapes(text):
    return {part.rpartition(":")[0]: part.rpartition(":")[2].split(",") for part in text.split(";")} if text else {}


def gears(options):
    return options["dynamic_batch_size"].split(",")


def is_gears(options):
    return "dynamic_batch_size" in options


# (code, when, sentence): `when` takes options, inputs of the ONNX file and the shapes given
REFUSALS = [
    ("E10054", lambda o, i, s: not o.get("soc_version"), "The required parameter soc_version for ATC is empty."),
    ("E10054", lambda o, i, s: not o.get("output"), "The required parameter output for ATC is empty."),
    ("E10007", lambda o, i, s: o.get("framework") != "5", "--framework is required. The value must be 0, 1, 3 or 5."),
    (
        "E10001",
        lambda o, i, s: not re.fullmatch(r"Ascend(310P\d|910B\d|910_\d{4}|910A|310B\d|950PR_\w+)", o["soc_version"]),
        "Value {soc_version} for parameter soc_version is invalid. Reason: unknown chip.",
    ),
    (
        "E10001",
        lambda o, i, s: not re.fullmatch(r"[\w./-]+", o["model"] + o["output"]),
        "Value for parameter model is invalid. Reason: characters.",
    ),
    (
        "E10009",
        lambda o, i, s: len([k for k in o if k.startswith("dynamic_")]) > 1,
        "--dynamic_batch_size, --dynamic_image_size and --dynamic_dims are mutually exclusive.",
    ),
    (
        "E10056",
        lambda o, i, s: "precision_mode" in o and "precision_mode_v2" in o,
        "--precision_mode and --precision_mode_v2 cannot be used together.",
    ),
    (
        "E10001",
        lambda o, i, s: o.get("precision_mode", "force_fp16") not in MODES,
        "Value for precision_mode is invalid.",
    ),
    (
        "E10016",
        lambda o, i, s: set(s) - set(i),
        "Op name {names} specified in --input_shape is not found in the model.",
    ),
    (
        "E10049",
        lambda o, i, s: any(len(dims) != len(i[name]) for name, dims in s.items()),
        "Rank of input_shape differs.",
    ),
    (
        "E10001",
        lambda o, i, s: not s and any(d < 1 for dims in i.values() for d in dims),
        "Dynamic model without shape.",
    ),
    ("E10001", lambda o, i, s: any(d in ("0", "") for dims in s.values() for d in dims), "Value 0 in --input_shape."),
    (
        "E10031",
        lambda o, i, s: is_gears(o) and all(dims[0] != "-1" for dims in s.values()),
        "No input has -1 as its batch.",
    ),
    (
        "E10018",
        lambda o, i, s: is_gears(o) and any("-1" in dims[1:] for dims in s.values()),
        "Only the batch may be -1.",
    ),
    ("E10040", lambda o, i, s: is_gears(o) and any("~" in d for dims in s.values() for d in dims), "Range with gears."),
    ("E10035", lambda o, i, s: is_gears(o) and len(gears(o)) < 2, "At least 2 gears."),
    ("E10036", lambda o, i, s: is_gears(o) and len(gears(o)) > 100, "At most 100 gears."),
    ("E10039", lambda o, i, s: is_gears(o) and len(set(gears(o))) < len(gears(o)), "Gears repeat."),
    ("E10038", lambda o, i, s: is_gears(o) and any(int(g) < 1 for g in gears(o)), "Gears must be positive."),
]


def aipp_constants(text):
    found = dict(re.findall(r"(\w+)\s*:\s*(\S+)", text))
    return {
        key: [float(found.get(f"{name}_{channel}", default)) for channel in range(3)]
        for key, name, default in (("mean", "mean_chn", 0), ("min", "min_chn", 0), ("var", "var_reci_chn", 1))
    }


def fail(code, sentence):
    print("ATC run failed, Please check the detail log, Try 'atc --help' for more information")
    print(f"{code}: {sentence}")
    print("        TraceBack (most recent call last):")
    sys.exit(255)


def main(arguments):
    print("ATC start working now, please wait for a moment.")
    options = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
    if set(options) - KNOWN:
        fail("E10001", f"unknown option {sorted(set(options) - KNOWN)}")
    if not pathlib.Path(options.get("model", "")).is_file():
        fail("E10001", "Value for parameter model is invalid. Reason: no such file.")
    inputs, opset = model_facts(options["model"])
    given = shapes(options.get("input_shape"))
    for code, refuses, sentence in REFUSALS:
        if refuses(options, inputs, given):
            fail(code, sentence.format(soc_version=options.get("soc_version"), names=sorted(given)))
    if not 9 <= opset <= 18:
        fail("E16002", f"No ONNX parser is registered for optype ai.onnx::{opset}::Conv.")
    aipp = pathlib.Path(options["insert_op_conf"]).read_text() if "insert_op_conf" in options else ""
    if aipp and re.search(r"mean_chn_\d\s*:\s*\d*\.\d", aipp):
        fail("E10001", "mean_chn holds whole numbers")
    if code := os.environ.get("FAKE_ATC_CODE"):
        fail(code, LATER[code])
    pathlib.Path("fusion_result.json").write_text("[]")
    pathlib.Path("kernel_meta").mkdir()
    ((_, dims),) = given.items()
    suffix = "_linux_x86_64.om" if os.environ.get("FAKE_ATC_HOST") else ".om"
    om = {"onnx": options["model"], "batch": int(dims[0])}
    if is_gears(options):
        om = {"onnx": options["model"], "gears": [int(gear) for gear in gears(options)]}
    if aipp:
        om["aipp"] = aipp_constants(aipp)
    pathlib.Path(options["output"] + suffix).write_text(json.dumps(om))
    print("...\nATC run success, welcome to the next use.")


if __name__ == "__main__":
    main(sys.argv[1:])
