"""run_atc.py: ONNX -> OM with atc. Checks beforehand what atc refuses, and reports its error code and message."""

import dataclasses
import pathlib
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from common import cli, files, processes
from common.deploy import atc_checks, file_names, om_metadata
from common.device import cann, cann_failure, npu_smi, versions
from common.errors import RunError, UserError, printable
from common.evaluation import aipp, engines, onnx_metadata
from common.files import write_atomic
from common.spec import ModelSpec

PRECISION_MODES = (
    "force_fp16 force_fp32 cube_fp16in_fp32out allow_fp32_to_fp16 must_keep_origin_dtype allow_mix_precision "
    "allow_mix_precision_fp16 allow_mix_precision_bf16 allow_fp32_to_bf16"
).split()
PRECISION_MODES_V2 = "fp16 origin cube_fp16in_fp32out mixed_float16 mixed_bfloat16 cube_hif8 mixed_hif8".split()
# Number formats in the names of modes, and the chips that have them.
FORMATS = {"bf": r"Ascend(310B|910B\d|910_93|950)", "hif8": r"Ascend950"}
KEEP_ALL_MODES = ("must_keep_origin_dtype", "origin")  # atc ignores --keep_dtype with them
INPUT_TYPES = {"FLOAT": "float32", "FLOAT16": "float16"}  # of an ONNX file
OUTPUT_TYPES = ("FP32", "FP16", "UINT8", "INT8")
# First and last opset that atc parses, over all versions of CANN.
OPSETS = (min(each.opsets[0] for each in versions.canns()), max(each.opsets[1] for each in versions.canns()))
NUM_DYNAMIC_BATCHES = (2, 100)  # fewest and most batch sizes of one --dynamic_batch_size
INSTALL_CANN = (
    "install the CANN toolkit and source its environment, /usr/local/Ascend/ascend-toolkit/set_env.sh or "
    "from CANN 8.5 on /usr/local/Ascend/cann/set_env.sh; --dry-run prints the command without it"
)


@dataclasses.dataclass(frozen=True)
class AtcConfig:
    """Options of tools/run_atc.py."""

    model: str = cli.option("", ".onnx file", required="an .onnx file")
    output: str = cli.option(
        "",
        "OM file without its suffix, batch size and input type, if that is not float32 (default: as the model, in this "
        "folder)",
    )
    batch: str = cli.option("", "images per run, one OM for each number: 1,4,8,16,32,64 [default 1]")
    dynamic_batch: str = cli.option("", "one OM that takes any of these numbers of images: 1,4,8")
    soc_version: str = cli.option("", "chip, for example Ascend310P3 (default: npu-smi is asked)")
    aipp: bool = cli.option(False, "normalize on the device: the model then takes uint8 HWC files")
    arch: str = cli.option("", "folder of the model whose normalization --aipp uses (default: stored in the .onnx)")
    image_size: int | None = cli.option(None, "side of the input of a model that leaves it open, pixels", low=1)
    precision_mode: str = cli.option(
        "",
        "number format of the layers (default: atc's own, float16); the modes of atc's --precision_mode_v2 too",
        choices=("", *dict.fromkeys([*PRECISION_MODES, *PRECISION_MODES_V2])),
    )
    precision_mode_v2: str = cli.option("", "atc's own option of this name", choices=("", *PRECISION_MODES_V2))
    keep_dtype: str = cli.option(
        "", "file of node names, one a line, that keep float32 (run_onnx.py --simulate-fp16 finds them)"
    )
    compression_optimize_conf: str = cli.option(
        "", "atc's own file of this name: calibration to int8, int8 in the first layer (docs/QUANTIZE.md)"
    )
    output_type: str = cli.option("", "type of the logits", choices=("", *OUTPUT_TYPES))
    log: str = cli.option("error", "what atc logs", choices=("debug", "info", "warning", "error", "null"))
    dry_run: bool = cli.option(False, "check everything, write the AIPP file, print the commands, start nothing")

    def __post_init__(self) -> None:
        cli.check_ranges(self)
        if self.batch and self.dynamic_batch:
            raise UserError("--dynamic-batch: not together with --batch; one is several OM files, the other is one")
        if self.precision_mode and self.precision_mode_v2:
            raise UserError("--precision-mode-v2: not together with --precision-mode; atc takes one of them")
        if self.keep_dtype and self.mode in KEEP_ALL_MODES:
            raise UserError(f"--keep-dtype: has no effect with --precision-mode {self.mode}, which keeps every layer")

    @property
    def mode(self) -> str:
        """The precision mode; empty: atc's default. --keep_dtype does nothing without one."""
        return self.precision_mode or self.precision_mode_v2 or ("force_fp16" if self.keep_dtype else "")

    @property
    def mode_option(self) -> str:
        """The option of atc that takes the mode."""
        is_v2 = self.precision_mode_v2 or self.mode not in PRECISION_MODES
        return "precision_mode_v2" if is_v2 else "precision_mode"


def main(description: str, spec_of: Callable[[str], ModelSpec]) -> None:
    """Body of tools/run_atc.py; `spec_of` gives the ModelSpec for --arch."""
    with cli.exit_on_error():
        config, _ = cli.parse(AtcConfig(), description)
        convert(config, spec_of(config.arch) if config.arch else None)


def parse_batch_sizes(flag: str, text: str) -> list[int]:
    """Different positive numbers from "1,4,8"."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{flag}: {text}, must be numbers of at least 1, separated by commas")
    sizes = [int(part) for part in parts]
    if len(set(sizes)) < len(sizes):
        raise UserError(f"{flag}: {text} names a number twice")
    return sizes


def convert(config: AtcConfig, spec: ModelSpec | None = None) -> dict[int | str, pathlib.Path]:
    """Build the OM files that the options ask for.

    Args:
      spec: of --arch, whose normalization --aipp uses; default: stored in the ONNX file.
    Returns:
      batch size, or "1,4,8" for dynamic batch sizes -> OM file (on a dry run, the name that it would get).
    Raises:
      UserError: an input that atc would refuse. RunError: atc failed.
    """
    model = OnnxModel(config.model, config.image_size)
    name = onnx_metadata.network(model.metadata)
    if spec is not None and name and name != spec.name:
        raise UserError(f"--arch: {config.arch}, but {config.model} holds {printable(name)}; leave the option out")
    flag = "--dynamic-batch" if config.dynamic_batch else "--batch"
    sizes = parse_batch_sizes(flag, config.dynamic_batch or config.batch or "1")
    model.check_batches(sizes)
    fewest, most = NUM_DYNAMIC_BATCHES
    if config.dynamic_batch and not fewest <= len(sizes) <= most:
        raise UserError(f"--dynamic-batch: {len(sizes)} numbers, atc takes {fewest} to {most}")
    batches: Sequence[int | str] = [",".join(map(str, sizes))] if config.dynamic_batch else sizes
    base = pathlib.Path(config.output or pathlib.Path(config.model).stem).absolute()
    file_names.check_characters("--model", model.path, "atc")
    file_names.check_characters("--output", base, "atc")
    if not base.parent.is_dir():
        raise UserError(f"--output: {base.parent} is not a folder")
    if config.aipp or not config.dry_run:
        files.check_writable(base, "--output")
    soc_version = npu_smi.check_chip_name(config.soc_version) if config.soc_version else npu_smi.detect_chip_name()
    for name, chips in FORMATS.items():
        if name in config.mode.replace("bfloat16", "bf") and not re.match(chips, soc_version):
            raise UserError(
                f"--precision-mode: {config.mode} is not for {soc_version}; docs/ASCEND.md lists the others"
            )
    if config.keep_dtype:
        model.check_nodes("--keep-dtype", config.keep_dtype)
    if config.compression_optimize_conf:
        _check_compression(config)
    if not config.dry_run and shutil.which("atc") is None:
        raise UserError(f"atc: not on the PATH; {INSTALL_CANN}")
    _check_cann(config, model, soc_version)
    aipp_file = _write_aipp_config(config, model, base, spec) if config.aipp else None
    dtype = "uint8" if aipp_file else model.dtype
    name = base.name if dtype == "float32" else f"{base.name}_{dtype}"
    targets = {batch: base.with_name(f"{name}_bs{str(batch).replace(',', '-')}") for batch in batches}
    commands = {
        batch: atc_command(config, model, target, batch, soc_version, aipp_file) for batch, target in targets.items()
    }
    compression = [pathlib.Path(config.compression_optimize_conf)] if config.compression_optimize_conf else []
    sources = om_metadata.sources_of([*model.files, *filter(None, [aipp_file]), *compression])
    kept = {  # all are checked before the first is built
        batch: om
        for batch, target in targets.items()
        for om in _om_files(target)
        if om_metadata.is_up_to_date(om, commands[batch], sources)
    }
    built = {}
    for batch, target in targets.items():
        if batch in kept:
            built[batch] = kept[batch]
            print(
                f"{kept[batch]}: kept, {model.path.name} has not changed since; remove it to build it again", flush=True
            )
            continue
        print(shlex.join(commands[batch]), flush=True)
        built[batch] = pathlib.Path(f"{target}.om")
        if not config.dry_run:
            metadata = om_metadata.OmMetadata(
                arch=onnx_metadata.network(model.metadata),
                input=model.input_name,
                batch=batch,
                shape=[*model.image_shape[1:], 3] if aipp_file else model.image_shape,
                dtype=dtype,
                soc_version=soc_version,
                command=commands[batch],
                sources=sources,
            )
            with files.claimed(built[batch], "--output"):
                built[batch] = _run_atc(commands[batch], target)
                om_metadata.write(built[batch], metadata)
    return built


class OnnxModel:
    """The properties of an ONNX file that atc depends on.

    Attributes:
      path: absolute.
      files: `path` and those that hold its external data.
      input_name: of the only input.
      batch: fixed batch size, or None.
      image_shape: [3, H, W].
      dtype: float32 or float16.
      opset: of the standard operators.
      node_names: of its layers.
      metadata: what export.py stored.
    Raises:
      UserError: unreadable, an opset that atc does not parse, or an input that is no batch of images.
    """

    def __init__(self, path: str, image_size: int | None = None) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        self.path = pathlib.Path(path).absolute()
        if not self.path.is_file():
            raise UserError(f"--model: {path} does not exist")
        try:
            proto = onnx.load(str(self.path), load_external_data=False)
        except (DecodeError, OSError) as error:
            raise UserError(f"--model: {path} is not an ONNX file ({error})") from error
        self.opset: int = {entry.domain: entry.version for entry in proto.opset_import}.get("", 0)
        if not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise UserError(
                f"--model: {path} has opset {self.opset}, atc takes {OPSETS[0]} to {OPSETS[1]}; "
                "export it with --opset 11"
            )
        if self.opset == OPSETS[1] and any(node.op_type == "ReduceMean" for node in proto.graph.node):
            raise UserError(
                f"--model: {path} has a ReduceMean of opset 18, which atc misreads; export it with --opset 11"
            )
        entries = [entry for tensor in proto.graph.initializer for entry in tensor.external_data]
        external = {self.path.parent / entry.value for entry in entries if entry.key == "location"}
        self.files = [self.path, *sorted(path for path in external if path.is_file())]
        self.node_names = frozenset(node.name for node in proto.graph.node)
        weights = {tensor.name for tensor in proto.graph.initializer}
        inputs = [value for value in proto.graph.input if value.name not in weights]
        if len(inputs) != 1:
            raise UserError(
                f"--model: {path} has {len(inputs)} inputs ({', '.join(value.name for value in inputs)}), "
                "expected one batch of images"
            )
        self.input_name = inputs[0].name
        if not self.input_name or re.search(r"[:;,\s]", self.input_name):
            raise UserError(
                f"--model: the input of {path} is called {self.input_name!r}, which --input_shape cannot express; "
                "rename it"
            )
        dims = [dim.dim_value or None for dim in inputs[0].type.tensor_type.shape.dim]
        if len(dims) != 4 or dims[1] not in (3, None):
            raise UserError(f"--model: the input of {path} has shape {dims}, expected N x 3 x H x W")
        kind = onnx.TensorProto.DataType.Name(inputs[0].type.tensor_type.elem_type)
        if kind not in INPUT_TYPES:
            raise UserError(f"--model: the input of {path} has type {kind}, expected {' or '.join(INPUT_TYPES)}")
        self.dtype = INPUT_TYPES[kind]
        self.metadata = onnx_metadata.decode({entry.key: entry.value for entry in proto.metadata_props})
        if "quantization" in self.metadata and self.metadata["quantization"].get("activations") == "uint8":
            raise UserError(
                f"--model: {path} is an int8 file for CPUs, which atc does not compute as int8; "
                "make one for it: python tools/quantize.py --for om"
            )
        engines.check_image_size(path, image_size, dims[1:])
        size = image_size or self.metadata.get("image_size")
        self.batch: int | None = dims[0]
        height, width = dims[2] or size, dims[3] or size
        if height is None or width is None:
            raise UserError(f"--image-size: {path} leaves it open; give it in pixels")
        self.image_shape = [3, height, width]

    def check_nodes(self, flag: str, path: str) -> None:
        """Raise UserError for a file whose lines are not names of nodes, or OpType::NAME, which atc would ignore."""
        try:
            lines = [line.strip() for line in pathlib.Path(path).read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag}: {path}: {error}") from error
        file_names.check_characters(flag, pathlib.Path(path).absolute(), "atc")
        names = [line for line in lines if line and not line.startswith("OpType::")]
        unknown = [name for name in names if name not in self.node_names]
        if unknown or not lines:
            raise UserError(
                f"{flag}: {path}: {unknown[0] if unknown else 'empty'}; expected names of nodes in {self.path}"
            )

    def check_batches(self, sizes: list[int]) -> None:
        """Raise UserError for batch sizes that a model of fixed batch size does not take."""
        if self.batch is not None and sizes != [self.batch]:
            raise UserError(
                f"--batch: {','.join(map(str, sizes))}, but {self.path.name} is fixed to {self.batch} "
                "images; export it with a dynamic batch"
            )


def _check_compression(config: AtcConfig) -> None:
    """Raise UserError for a file of --compression-optimize-conf that atc cannot read or whose int8 would be lost."""
    flag, path = "--compression-optimize-conf", pathlib.Path(config.compression_optimize_conf)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: {path}: {error}") from error
    file_names.check_characters(flag, path.absolute(), "atc")
    calibrates = re.search(r"^\s*calibration\s*:", text, re.MULTILINE)
    if not calibrates and not re.search(r"^\s*enable_first_layer_quantization\s*:", text, re.MULTILINE):
        raise UserError(f"{flag}: {path} holds neither calibration: nor enable_first_layer_quantization:")
    missing = [key for key in ("input_data_dir", "input_shape", "infer_soc") if not re.search(rf"\b{key}\s*:", text)]
    if calibrates and missing:
        raise UserError(f"{flag}: {path}: calibration needs {', '.join(missing)}")
    if calibrates and config.mode in (*KEEP_ALL_MODES, "force_fp32"):
        raise UserError(f"{flag}: {path} calibrates to int8, which --precision-mode {config.mode} undoes")
    if calibrates and config.dynamic_batch:
        raise UserError(f"{flag}: {path} calibrates to int8, which has no dynamic batch; use --batch")


def normalization(
    metadata: onnx_metadata.OnnxMetadata, spec: ModelSpec | None
) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) of the spec, else those stored in the ONNX file."""
    if spec is not None:
        return spec.mean, spec.std
    if "mean" in metadata and "std" in metadata:
        return metadata["mean"], metadata["std"]
    raise UserError("--arch: missing; the .onnx file does not say which model it is, name its folder")


def _check_cann(config: AtcConfig, model: OnnxModel, soc_version: str) -> None:
    """Print what atc will probably fail of; UserError for an opset that the installed one does not parse."""
    problem = atc_checks.opset_problem(model.opset, is_other_machine=config.dry_run)
    if problem and cann.version() and not config.dry_run:
        raise UserError(f"--model: {config.model} has {problem}")
    warnings = [f"--model: {config.model} has {problem}"] if problem else []
    if not config.dry_run:
        warnings += atc_checks.environment_problems(soc_version)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _write_aipp_config(config: AtcConfig, model: OnnxModel, base: pathlib.Path, spec: ModelSpec | None) -> pathlib.Path:
    _, height, width = model.image_shape
    if height != width:
        raise UserError(f"--aipp: {config.model} takes {height} x {width} pixels, the AIPP file is for squares")
    path = base.with_name(f"{base.name}_aipp.cfg")
    content = aipp.config_text(*normalization(model.metadata, spec), width)
    found = path.read_text(errors="replace") if path.exists() else ""
    if found and found != content:
        keys = [[line.partition(":")[0] for line in text.splitlines()] for text in (found, content)]
        if keys[0] != keys[1] or path.stat().st_mtime_ns >= model.path.stat().st_mtime_ns:
            raise UserError(f"--aipp: {path} exists with other content; remove it or choose another --output")
    if found != content:
        write_atomic(path, content)
    print(f"AIPP file: {path}", flush=True)
    return path


def atc_command(
    config: AtcConfig,
    model: OnnxModel,
    target: pathlib.Path,
    batch: int | str,
    soc_version: str,
    aipp_file: pathlib.Path | None,
) -> list[str]:
    """The arguments for one OM file; a `batch` like "1,4,8" makes its batch size dynamic."""
    is_dynamic = isinstance(batch, str)
    shape = ",".join(map(str, [-1 if is_dynamic else batch, *model.image_shape]))
    command = [
        "atc",
        "--framework=5",
        f"--model={model.path}",
        f"--output={target}",
        "--input_format=NCHW",
        f"--input_shape={model.input_name}:{shape}",
        f"--log={config.log}",
        f"--soc_version={soc_version}",
    ]
    optional = {
        "dynamic_batch_size": batch if is_dynamic else "",
        "insert_op_conf": aipp_file or "",
        config.mode_option: config.mode,
        "keep_dtype": config.keep_dtype and pathlib.Path(config.keep_dtype).absolute(),
        "compression_optimize_conf": config.compression_optimize_conf
        and pathlib.Path(config.compression_optimize_conf).absolute(),
        "output_type": config.output_type,
    }
    return command + [f"--{name}={value}" for name, value in optional.items() if value]


def _om_files(target: pathlib.Path) -> list[pathlib.Path]:
    """The OM files of a target; atc appends the platform to the name of a model with operators that run on the host."""
    found = [target.with_name(f"{target.name}.om"), *target.parent.glob(f"{target.name}_linux_*.om")]
    return [path for path in found if path.exists()]


def _run_atc(command: list[str], target: pathlib.Path) -> pathlib.Path:
    """Run atc in a temporary folder, where it leaves its by-products, and return the OM file that it wrote."""
    started_ns = time.time_ns()
    with tempfile.TemporaryDirectory() as folder:
        done = processes.run_program(command, cwd=folder)
    found = [path for path in _om_files(target) if path.stat().st_mtime_ns >= started_ns - 10**9]
    if done.returncode != 0 or "ATC run success" not in done.stdout or not found:
        raise RunError(_failure(done.returncode, done.stdout))
    found[0].chmod(found[0].stat().st_mode & ~0o022)  # ais_bench since 2024 refuses files that others may write
    print(f"{found[0]}: {found[0].stat().st_size} bytes", flush=True)
    return found[0]


def _failure(status: int, output: str) -> str:
    """One line with atc's exit status, the cause, a remedy, and the place of its log."""
    log = pathlib.Path.home() / "ascend" / "log" / "debug" / "plog"
    return f"atc: exit status {status}, {cann_failure.explain(output, is_converter=True)}; its log is in {log}"
