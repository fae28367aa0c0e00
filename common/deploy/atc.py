"""ONNX -> OM with atc: what atc would refuse is refused here first, and what it says on failure is passed on."""

import dataclasses
import importlib
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import tempfile
import time

from common import cli
from common.device import npu_smi
from common.errors import RunError, UserError
from common.evaluation import aipp
from common.files import write_atomic

PRECISION_MODES = (
    "force_fp16",
    "force_fp32",
    "cube_fp16in_fp32out",
    "allow_fp32_to_fp16",
    "must_keep_origin_dtype",
    "allow_mix_precision",
    "allow_mix_precision_fp16",
    "allow_mix_precision_bf16",
    "allow_fp32_to_bf16",
)
PRECISION_MODES_V2 = (
    "fp16",
    "origin",
    "cube_fp16in_fp32out",
    "mixed_float16",
    "mixed_bfloat16",
    "cube_hif8",
    "mixed_hif8",
)
OUTPUT_TYPES = ("FP32", "FP16", "UINT8", "INT8")
OPSETS = (9, 18)
GEARS = (2, 100)
SAFE_PATH = re.compile(r"[\w./-]+")  # atc takes letters, digits, Chinese, _ - . only
CODE = re.compile(r"\b(E[A-Z]?\d{4,5})\b\s*[:\]]?\s*(.*)")
HINTS = {
    "E16002": "an operator set this CANN has no tables for; export with --opset 11",
    "E19010": "an operator set this CANN has no tables for; export with --opset 11",
    "EZ3003": "no kernel for this chip; since CANN 8.5 the chip's ops package must be installed too",
    "E10501": "an operator this CANN does not know; export with --opset 11",
    "E40000": "atc's Python packages are missing; pip install decorator sympy cffi protobuf attrs pyyaml scipy psutil",
    "E40020": "atc's Python packages are missing; pip install decorator sympy cffi protobuf attrs pyyaml scipy psutil",
}
HOW_TO_GET = (
    "install the CANN toolkit and source its environment, /usr/local/Ascend/ascend-toolkit/set_env.sh or "
    "from CANN 8.5 on /usr/local/Ascend/cann/set_env.sh; --dry-run prints the command without it"
)


@dataclasses.dataclass(frozen=True)
class AtcConfig:
    """Options of tools/run_atc.py."""

    model: str = cli.option("", ".onnx file")
    output: str = cli.option("", "OM file without its suffix and batch size (default: as the model, in this folder)")
    batch: str = cli.option("", "images per run, one OM for each number: 1,4,8,16,32,64 [default 1]")
    dynamic_batch: str = cli.option("", "one OM that takes any of these numbers of images: 1,4,8")
    soc_version: str = cli.option("", "chip, for example Ascend310P3 (default: npu-smi is asked)")
    aipp: bool = cli.option(False, "normalize on the device: the model then takes uint8 HWC files")
    arch: str = cli.option("", "folder of the model whose normalization --aipp uses (default: stored in the .onnx)")
    image_size: int | None = cli.option(None, "side of the input of a model that leaves it open, pixels", low=1)
    precision_mode: str = cli.option("", "atc's own option of this name", choices=("", *PRECISION_MODES))
    precision_mode_v2: str = cli.option("", "atc's own option of this name", choices=("", *PRECISION_MODES_V2))
    output_type: str = cli.option("", "type of the logits", choices=("", *OUTPUT_TYPES))
    log: str = cli.option("error", "what atc logs", choices=("debug", "info", "warning", "error", "null"))
    dry_run: bool = cli.option(False, "check everything, write the AIPP file, print the commands, start nothing")

    def __post_init__(self):
        cli.check_ranges(self)
        if self.batch and self.dynamic_batch:
            raise UserError("--dynamic-batch: not together with --batch; one is several OM files, the other is one")
        if self.precision_mode and self.precision_mode_v2:
            raise UserError("--precision-mode-v2: not together with --precision-mode; atc takes one of them")


def main(description, argv=None):
    """Body of tools/run_atc.py."""
    with cli.exit_on_error():
        config, _ = cli.parse(AtcConfig(), description, argv)
        convert(config)


def numbers(flag, words):
    """A list of different positive numbers from "1,4,8"."""
    parts = words.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{flag}: {words}, must be numbers of at least 1, separated by commas")
    values = [int(part) for part in parts]
    if len(set(values)) < len(values):
        raise UserError(f"{flag}: {words} names a number twice")
    return values


def convert(config):
    """Build the OM files that the options ask for.

    Returns:
      dict: batch size, or "1,4,8" for gears -> pathlib.Path of the OM file (its future name on a dry run).
    Raises:
      UserError: what atc would refuse. RunError: what it did refuse.
    """
    model = OnnxFacts(config.model, config.image_size)
    gears = numbers("--dynamic-batch", config.dynamic_batch) if config.dynamic_batch else None
    batches = None if gears else numbers("--batch", config.batch or "1")
    model.check_batches(gears or batches)
    if gears and not GEARS[0] <= len(gears) <= GEARS[1]:
        raise UserError(f"--dynamic-batch: {len(gears)} numbers, atc takes {GEARS[0]} to {GEARS[1]}")
    base = pathlib.Path(config.output or pathlib.Path(config.model).stem).absolute()
    for flag, path in (("--model", model.path), ("--output", base)):
        if not SAFE_PATH.fullmatch(str(path)):
            raise UserError(f"{flag}: {path} has characters other than letters, digits and _ - . which atc refuses")
    if not base.parent.is_dir():
        raise UserError(f"--output: {base.parent} is not a folder")
    chip = npu_smi.check_chip_name(config.soc_version) if config.soc_version else npu_smi.detect_chip_name()
    aipp_file = _write_aipp(config, model, base) if config.aipp else None
    if not config.dry_run and shutil.which("atc") is None:
        raise UserError(f"atc: not on the PATH; {HOW_TO_GET}")
    built = {}
    for batch in [",".join(map(str, gears))] if gears else batches:
        target = base.with_name(f"{base.name}_bs{str(batch).replace(',', '-')}")
        command = atc_command(config, model, target, batch, chip, aipp_file, bool(gears))
        print(shlex.join(command), flush=True)
        built[batch] = pathlib.Path(f"{target}.om")
        if not config.dry_run:
            built[batch] = _run(command, target)
            _write_facts(built[batch], model, batch, chip, bool(aipp_file))
    return built


class OnnxFacts:
    """What atc needs to know of an ONNX file.

    Attributes:
      path, name, shape: absolute path; the input's name and [N or None, 3, H, W].
    Raises:
      UserError: unreadable, an operator set atc has no tables for, or other inputs than one batch of images.
    """

    def __init__(self, path, image_size=None):
        import onnx
        from google.protobuf.message import DecodeError

        self.path = pathlib.Path(path).absolute()
        if not path or not self.path.is_file():
            raise UserError(f"--model: {path or 'missing'} {'does not exist' if path else '; it needs an .onnx file'}")
        try:
            proto = onnx.load(str(self.path), load_external_data=False)
        except (DecodeError, OSError) as error:
            raise UserError(f"--model: {path} is not an ONNX file ({error})") from error
        opset = {entry.domain: entry.version for entry in proto.opset_import}.get("", 0)
        if not OPSETS[0] <= opset <= OPSETS[1]:
            raise UserError(
                f"--model: {path} has opset {opset}, atc takes {OPSETS[0]} to {OPSETS[1]}; export it with --opset 11"
            )
        if opset == OPSETS[1] and any(node.op_type == "ReduceMean" for node in proto.graph.node):
            raise UserError(
                f"--model: {path} has a ReduceMean of opset 18, which atc reads wrongly; export it with --opset 11"
            )
        weights = {tensor.name for tensor in proto.graph.initializer}
        inputs = [value for value in proto.graph.input if value.name not in weights]
        if len(inputs) != 1:
            raise UserError(
                f"--model: {path} has {len(inputs)} inputs ({', '.join(value.name for value in inputs)}), "
                "expected one batch of images"
            )
        self.name = inputs[0].name
        if not self.name or re.search(r"[:;,\s]", self.name):
            raise UserError(
                f"--model: the input of {path} is called {self.name!r}, which --input_shape cannot express; rename it"
            )
        dims = [dim.dim_value or None for dim in inputs[0].type.tensor_type.shape.dim]
        if len(dims) != 4 or dims[1] not in (3, None):
            raise UserError(f"--model: the input of {path} has shape {dims}, expected N x 3 x H x W")
        self.facts = {entry.key: entry.value for entry in proto.metadata_props}
        size = image_size or (int(self.facts["image_size"]) if "image_size" in self.facts else None)
        self.shape = [dims[0], 3, dims[2] or size, dims[3] or size]
        if None in self.shape[1:]:
            raise UserError(f"--image-size: {path} leaves it open; give it in pixels")

    def check_batches(self, batches):
        """A file of fixed batch size converts to that size only."""
        if self.shape[0] is not None and list(batches) != [self.shape[0]]:
            raise UserError(
                f"--batch: {','.join(map(str, batches))}, but {self.path.name} is fixed to {self.shape[0]} "
                "images; export it with a dynamic batch"
            )


def normalization(facts, arch):
    """(mean, std) of a model: those of the named folder's ModelSpec, else those stored in the ONNX file."""
    if not arch:
        if "mean" in facts and "std" in facts:
            return json.loads(facts["mean"]), json.loads(facts["std"])
        raise UserError("--arch: missing; the .onnx file does not say which model it is, name its folder")
    for module in (f"{arch}.spec", f"{arch}.src.config"):
        try:
            spec = importlib.import_module(module).SPEC
            return spec.mean, spec.std
        except ModuleNotFoundError:
            continue
    raise UserError(f"--arch: {arch} is no model folder of this repository")


def _write_aipp(config, model, base):
    height, width = model.shape[2:]
    if height != width:
        raise UserError(f"--aipp: {config.model} takes {height} x {width} pixels, the AIPP file is for squares")
    path = base.with_name(f"{base.name}_aipp.cfg")
    write_atomic(path, aipp.config_text(*normalization(model.facts, config.arch), width))
    print(f"AIPP file: {path}", flush=True)
    return path


def atc_command(config, model, target, batch, chip, aipp_file, gears):
    """The argument list for one OM file."""
    shape = ",".join(map(str, [-1 if gears else batch, *model.shape[1:]]))
    command = [
        "atc",
        "--framework=5",
        f"--model={model.path}",
        f"--output={target}",
        "--input_format=NCHW",
        f"--input_shape={model.name}:{shape}",
        f"--log={config.log}",
        f"--soc_version={chip}",
    ]
    optional = {
        "dynamic_batch_size": batch if gears else "",
        "insert_op_conf": aipp_file or "",
        "precision_mode": config.precision_mode,
        "precision_mode_v2": config.precision_mode_v2,
        "output_type": config.output_type,
    }
    return command + [f"--{name}={value}" for name, value in optional.items() if value]


def _run(command, target):
    """Run atc in a scratch folder, where it drops its by-products, and find the file it wrote."""
    started_ns = time.time_ns()
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            command,
            cwd=scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    # A model with host code gets the platform behind its name.
    found = [
        path
        for path in (target.with_name(f"{target.name}.om"), *target.parent.glob(f"{target.name}_linux_*.om"))
        if path.exists() and path.stat().st_mtime_ns >= started_ns - 10**9
    ]
    if done.returncode != 0 or "ATC run success" not in done.stdout or not found:
        raise RunError(failure(done.returncode, done.stdout))
    print(f"{found[0]}: {found[0].stat().st_size} bytes", flush=True)
    return found[0]


def failure(status, output):
    """atc's exit status, its own code and sentence, what to do, and where its log is."""
    codes = [match.groups() for line in output.splitlines() if (match := CODE.search(line))]
    if codes:
        code, sentence = codes[0]
        said = f"{code}: {sentence.strip()}"
        hint = f"; {HINTS[code]}" if code in HINTS else ""
    else:
        said = (output.strip().splitlines() or ["nothing"])[-1]
        hint = ""
    if "libascend_hal.so" in output:
        hint = (
            "; this machine has no NPU driver, put CANN's devlib folder in LD_LIBRARY_PATH "
            "(/usr/local/Ascend/cann/<arch>-linux/devlib)"
        )
    log = pathlib.Path.home() / "ascend" / "log" / "debug" / "plog"
    return f"atc: exit status {status}, {said}{hint}; its log is in {log}"


def facts_file(om):
    """Where run_atc notes what an OM file takes: beside it, INPUT.om.json."""
    return pathlib.Path(f"{om}.json")


def _write_facts(om, model, batch, chip, has_aipp):
    """An OM file does not tell its input type to a plain program, and ais_bench checks no more than divisibility."""
    _, channels, height, width = model.shape
    facts = {
        "input": model.name,
        "batch": batch,
        "shape": [height, width, channels] if has_aipp else model.shape[1:],
        "dtype": "uint8" if has_aipp else "float32",
        "soc_version": chip,
    }
    write_atomic(facts_file(om), json.dumps(facts) + "\n")
