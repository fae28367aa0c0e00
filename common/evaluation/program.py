"""eval.py of every model: accuracy straight from the images, with a checkpoint, an .onnx or an .om file."""

import contextlib
import dataclasses
import os
import pathlib
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import cli, files, parallel
from common.data import labels
from common.errors import UserError, printable
from common.evaluation import (
    aipp,
    class_names,
    engine_choice,
    engines,
    metrics_json,
    om_session,
    onnx_conversion,
    onnx_header,
    onnx_metadata,
    predictions,
)
from common.spec import ModelSpec
from common.weights.load import load_model

if typing.TYPE_CHECKING:
    import numpy as np

    from common.data.batch import Batch, ThreadLoader
    from common.data.index import FolderIndex
    from common.data.loader import EvalLoader
    from common.device.device import Device
    from common.distributed import Group, World
    from common.evaluation.evaluate import Classifier, Observer
    from common.evaluation.metrics import Counts


_EXPORTED = (".onnx", ".om")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Options of eval.py, one field each."""

    data: str = cli.option(
        "", "folder with val/: class folders, or images beside val_label.txt", required="the folder that holds val/"
    )
    resume: str = cli.option(
        "",
        "what to evaluate: a checkpoint (torch), .onnx (ONNX Runtime) or .om (NPU)",
        "--ckpt",
        "--model",
        required="a checkpoint, .onnx or .om file",
    )
    label_numbers: str = labels.numbers_option()
    exclude: str = cli.option("", "list of images to leave out, one path per line, as tools/check_data.py writes it")
    device: str = cli.option("auto", "device of a checkpoint", choices=cli.DEVICES)
    device_id: int = cli.option(0, "index of the device", low=0, high=255)
    provider: str = cli.option("cpu", "ONNX Runtime's execution provider", choices=tuple(engines.PROVIDERS))
    engine: str = cli.option(
        "default",
        "what computes on a CPU; default: torch for a checkpoint, onnxruntime for .onnx; auto: the fastest in float32 "
        "or in the precision of the checkpoint's training, by a measurement that is kept for this machine and file",
        choices=engine_choice.ENGINES,
    )
    fast: bool = cli.option(
        False,
        "compute with the engine and precision (bfloat16 too) that are the fastest on this CPU, if a sample of images "
        "has nearly the same results; both are printed",
    )
    batch_size: int = cli.option(
        64, "images per run, at most; a CPU takes fewer, a model of fixed batch its own", "-b", low=1
    )
    workers: int = cli.option(2, "processes that decode", "-j", low=0)
    threads: int = cli.option(0, "cores of the network on a CPU; 0 is all", low=0)
    num_classes: int | None = cli.option(None, "columns of a checkpoint's output; cuts off a background class", low=1)
    image_size: int | None = cli.option(None, "side of the input, pixels (default: as stored)", low=1)
    transform_input: bool | None = cli.option(None, "convert ImageNet-normalized input to 0.5/0.5; default: as stored")
    compile: bool = cli.option(
        False, "torch.compile the network of a checkpoint (minutes before the first batch); on npu with torchair"
    )
    full_fp32: bool = cli.option(False, "compute float32 in full: no HF32 on npu, no TF32 on cuda; for a checkpoint")
    use_ema: bool | None = cli.option(None, "take a checkpoint's averaged weights; default: where it has them")
    aipp_config: str = cli.option("", "AIPP file: normalize as the device would, in float16")
    on_bad_image: str = cli.option(
        "fail",
        "what to do with a file that does not decode: end, or leave it out of the counts",
        choices=("fail", "skip"),
    )
    predictions: str = cli.option("", "file to write the five best classes of each image to, .csv or .json")
    class_names: str = cli.option("", "names of the classes in --predictions: one per line, or class_index.json")
    metrics_json: str = cli.option("", "file to write the accuracies to, as postprocess.py does")

    def __post_init__(self) -> None:
        cli.check_ranges(self)
        if self.predictions:
            predictions.check_format(self.predictions)
        elif self.class_names:
            raise UserError(f"--class-names: {self.class_names}, has no effect without --predictions; leave it out")


class EvalModel(typing.NamedTuple):
    """A loaded model.

    Attributes:
      classes: class names, where the file has them.
      taken: see common.weights.load.Checkpoint.
      run_options: options of the training run that wrote a checkpoint; empty for other files.
      engine, precision: what computes the logits.
      choice: why, where that was measured.
      short_training: see common.evaluation.torch_classifier.
    """

    classifier: "Classifier"
    num_outputs: int
    image_size: int
    classes: Sequence[str] | None
    taken: str = ""
    run_options: Mapping[str, Any] = types.MappingProxyType({})
    engine: str = "torch"
    precision: str = engine_choice.FLOAT32
    choice: str = ""
    short_training: tuple[int, float | None] = (0, None)


# A model, the images to score, and their loader.
Opened: typing.TypeAlias = "tuple[EvalModel, FolderIndex, EvalLoader | ThreadLoader]"


def main(spec: ModelSpec, description: str) -> None:
    """Body of a model's eval script."""
    with cli.exit_on_error():
        config, _ = cli.parse(EvalConfig(), description)
        if config.metrics_json:
            files.check_file(config.metrics_json, "--metrics-json")
        check_outputs(config)
        counts, model = evaluate_folder(spec, config)
        print(counts)
        print(metrics_json.format_table(counts))
        write_metrics(config, counts, model)


def check_outputs(config: EvalConfig, **more: str) -> None:
    """Raise UserError where a file to write is one that the evaluation reads.

    Args:
      more: further options that name a file to write.
    """
    inputs = {cli.flag_of(type(config).__dataclass_fields__[name]): getattr(config, name) for name in _INPUTS}
    inputs["the label file"] = os.path.join(config.data, "val_label.txt")
    for name, path in {"metrics_json": config.metrics_json, "predictions": config.predictions, **more}.items():
        files.check_distinct(path, cli.flag_of(type(config).__dataclass_fields__[name]), inputs)


_INPUTS = ("resume", "exclude", "class_names", "aipp_config")


def write_metrics(config: EvalConfig, counts: "Counts", model: EvalModel) -> None:
    """Write the file of --metrics-json, if it is given."""
    if config.metrics_json:
        computed = {"Engine": model.engine, "Precision": model.precision}
        metrics_json.write_metrics(config.metrics_json, counts, model.num_outputs, computed)


def evaluate_folder(
    spec: ModelSpec,
    config: EvalConfig,
    smoothing: Callable[[int], float] = lambda num_outputs: 0.0,
    world: "World | None" = None,
) -> "tuple[Counts, EvalModel]":
    """Score the validation images of a folder.

    Args:
      smoothing: number of columns -> label smoothing of the reported loss.
      world: of this process; every rank scores its share and rank 0 prints.
    Returns:
      (Counts over all ranks, the model).
    Raises:
      UserError: model, data and options that do not fit together, or an image that does not decode.
    """
    from common import distributed
    from common.data import file_tree
    from common.evaluation.evaluate import evaluate

    world = world or distributed.World()
    if config.predictions and world.is_main:
        predictions.check(config.predictions)
    opened = _open_without_torch(spec, config) if _may_do_without_torch(config, world) else None
    before_torch = time.perf_counter()
    device = None if opened else _activated_device(config, world)
    group = distributed.Group(world, device)
    with group.reports_once():
        model, index, images = opened or _open(spec, config, group, before_torch)
        if world.is_main:
            print("".join(f"{line}\n" for line in (model.taken, model.choice) if line), end="", flush=True)
        group.check_same(f"{len(index)} images ({index.fingerprint})", "--data")
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            stack.callback(images.close)
            observer: Observer | None = None
            if config.predictions:
                rows = _row_builder(spec, config, model, index)
                write = stack.enter_context(predictions.writer_of_ranks(config.predictions, group))

                def observer(batch: "Batch", logits_NK: "np.ndarray") -> None:
                    write(rows(batch, logits_NK))

            streams = _streams(model)
            counts = evaluate(
                model.classifier, images, len(index), group, smoothing(model.num_outputs), observer, streams
            )
            assert counts is not None  # never interrupted
            if not counts.seen:
                raise UserError(f"--data: none of the {len(index)} images in {index.root} decodes")
        group.close()
        seconds = time.perf_counter() - start
    if world.is_main:
        left_out = f" ({index.excluded} left out by --exclude)" if config.exclude else ""
        print(
            f"{config.resume}: {counts.seen} images of {config.data}{left_out} in {seconds:.1f} s "
            f"({counts.seen / seconds:.1f} images/s), {model.num_outputs} columns, {model.image_size} pixels, "
            f"{model.engine} {model.precision}",
            flush=True,
        )
        lowest = int(index.labels.min()) - spec.background_columns(model.num_outputs)
        if index.label_file and (note := counts.note_on_labels(lowest)):
            print(note, flush=True)
        steps, momentum = model.short_training
        if steps:
            from common.evaluation.metrics import note_on_loss

            if note := note_on_loss(counts.loss, 0.0, model.num_outputs, steps, momentum):
                print(note, flush=True)
        if kinds := file_tree.describe_ignored(index.ignored_kinds):
            print(f"note: ignored in {index.root}: {kinds}", flush=True)
    return counts, model


def _row_builder(spec: ModelSpec, config: EvalConfig, model: EvalModel, index: "FolderIndex") -> predictions.RowBuilder:
    background = spec.background_columns(model.num_outputs)
    stored = model.classes or index.classes or None
    names = class_names.names(stored, model.num_outputs - background, config.class_names)
    return predictions.RowBuilder(index, names, background)


def _streams(model: EvalModel) -> int:
    """How many batches the model takes at a time."""
    return getattr(model.classifier, "streams", 0)


# ---- files that need no torch ----------------------------------------------------------------------------------------


def _may_do_without_torch(config: EvalConfig, world: "World") -> bool:
    """Whether an engine other than torch may compute, in this process alone."""
    is_chosen = config.device == "cpu" and (config.engine != "default" or config.fast)
    return world.size == 1 and config.device in ("auto", "cpu") and (_is_exported(config) or is_chosen)


def _open_without_torch(spec: ModelSpec, config: EvalConfig) -> "Opened | None":
    """An exported file, or a checkpoint that another engine is to compute and that was converted before.

    Torch is not imported, which takes longer than some tens of images, and images are decoded while the engine starts.

    Returns:
      None for a checkpoint that must be read.
    Raises:
      UserError: the first mistake.
    """
    _check_engine(config, "cpu")
    from common.data.transforms import eval_transform

    file, threads = pathlib.Path(config.resume), config.threads or parallel.usable_cores()
    if not _is_exported(config):
        return _open_converted(spec, config, threads)
    _check_exported(config)
    is_on_cpu = file.suffix == ".onnx" and config.provider == "cpu"
    streams = engines.streams(threads) if is_on_cpu else 0
    header = onnx_header.read(file) if file.suffix == ".onnx" else None
    if header is None or not header.is_classifier:  # the engine names the fault
        model = _load_engine(spec, config, streams)
        fixed = model.classifier.engine.batch if isinstance(model.classifier, engines.EngineClassifier) else None
        return (model, *_decoding(spec, config, model, streams, fixed))
    metadata, (batch, *sides) = onnx_metadata.decode(header.metadata), header.inputs[0].shape
    _check_network(spec, config, onnx_metadata.network(metadata))
    size = _image_size(spec, config, sides, metadata)
    precision = engine_choice.precision_of(header)
    num_outputs = int(header.outputs[0].shape[-1] or 0)
    own = engine_choice.Way("onnxruntime", precision, threads)
    described = EvalModel(
        _not_loaded, num_outputs, size, metadata.get("classes"), engine=own.engine, precision=precision
    )
    index, loader = _decoding(spec, config, described, streams, batch if isinstance(batch, int) else None)
    if config.engine == "default" and not config.fast:
        return _load_engine(spec, config, streams), index, loader
    subject = _subject(spec, config, described, threads)
    choice = engine_choice.choose(subject, config.engine, config.fast, index, eval_transform(spec, size))
    return _computed_by(described, subject, choice), index, loader


def _open_converted(spec: ModelSpec, config: EvalConfig, threads: int) -> "Opened | None":
    """A checkpoint that was converted before, where torch is not to compute it."""
    if config.engine == "torch" or not pathlib.Path(config.resume).is_file():
        return None
    subject = _subject(spec, config, EvalModel(_not_loaded, 0, 0, None), threads)
    converted = onnx_conversion.load(subject.conversion_key)
    if converted is None:
        return None
    facts = dict(converted.facts)
    model = EvalModel(_not_loaded, **{**facts, "short_training": tuple(facts["short_training"])})
    subject = _subject(spec, config, model, threads, converted=converted, content=subject.content)
    index = load_index(config, model, spec.background_columns(model.num_outputs))
    choice: engine_choice.Choice | None = engine_choice.Choice(subject.named(config.engine))
    if config.engine in ("default", "auto") or config.fast:
        choice = engine_choice.kept(subject, config.engine, config.fast, index)
    if choice is None or choice.way.engine == "torch":
        return None
    index, images = _decoding(spec, config, model, engines.streams(threads), None)
    return _computed_by(model, subject, choice), index, images


def _not_loaded(pixels_NHWC: Any) -> "np.ndarray":
    """Classifier of a model whose engine starts later."""
    raise AssertionError(pixels_NHWC)


def _decoding(
    spec: ModelSpec, config: EvalConfig, model: EvalModel, streams: int, batch: int | None
) -> "tuple[FolderIndex, ThreadLoader]":
    """The images of a model, being decoded.

    Args:
      streams: see Engine.
      batch: the fixed batch size of the model, or None.
    """
    from common.data.batch import ThreadLoader
    from common.data.transforms import eval_transform

    index = load_index(config, model, spec.background_columns(model.num_outputs))
    size = batch or engines.images_per_run(config.batch_size, streams)
    sizes = engines.run_sizes(len(index), size, streams, is_fixed=batch is not None)
    workers = parallel.dataloader_workers(config.workers, 1)
    transform = eval_transform(spec, model.image_size)
    return index, ThreadLoader(index, transform, sizes, config.on_bad_image, workers)


def _subject(spec: ModelSpec, config: EvalConfig, model: EvalModel, threads: int, **more: Any) -> engine_choice.Subject:
    """What the engines compute.

    Args:
      more: further fields of Subject.
    """
    own = engine_choice.Way(model.engine, model.precision, threads)
    variant = (config.num_classes, config.use_ema, config.transform_input, config.image_size)
    file, batch_size = pathlib.Path(config.resume), config.batch_size
    return engine_choice.Subject(spec, file, own, model.image_size, batch_size, variant, **more)


def _computed_by(model: EvalModel, subject: engine_choice.Subject, choice: engine_choice.Choice) -> EvalModel:
    """The model with the engine and precision of --engine and --fast."""
    way = choice.way
    is_own = way == subject.own and model.classifier is not _not_loaded
    classifier = model.classifier if is_own else subject.build(way)
    return model._replace(classifier=classifier, engine=way.engine, precision=way.precision, choice=choice.note)


# ---- checkpoints, and several ranks ----------------------------------------------------------------------------------


def _activated_device(config: EvalConfig, world: "World") -> "Device":
    """The device of this process."""
    from common.device import device as devices

    device = devices.choose(config.device, world.local_rank if world.size > 1 else config.device_id)
    device.activate()
    if config.full_fp32:
        device.use_full_fp32()
    return device


def _open(spec: ModelSpec, config: EvalConfig, group: "Group", before_torch: float) -> Opened:
    """Any model, by torch where no engine was chosen; every rank loads its share of the images.

    Args:
      before_torch: time.perf_counter() before torch was imported.
    """
    from common.data.loader import EvalLoader
    from common.data.transforms import eval_transform

    world, device = group.world, group.device
    model, index = group.local_rank0_first(lambda: prepare(spec, config, device, world))
    load_s = time.perf_counter() - before_torch
    transform = eval_transform(spec, model.image_size)
    if config.engine != "default" or config.fast:

        def choose() -> EvalModel:
            threads = config.threads or max(1, parallel.usable_cores() // world.local_size)
            network = getattr(model.classifier, "model", None)
            names = ("num_outputs", "image_size", "classes", "taken", "engine", "precision", "short_training")
            facts = {name: getattr(model, name) for name in names}
            more = dict(device=device, network=network, facts=facts, load_s=load_s)
            subject = _subject(spec, config, model, threads, **more)
            choice = engine_choice.choose(subject, config.engine, config.fast, index, transform)
            return _computed_by(model, subject, choice)

        model = group.local_rank0_first(choose)
    streams = _streams(model)
    if world.size == 1 and model.engine != "torch":  # no process is started from one with the engine's threads
        return (model, *_decoding(spec, config, model, streams, None))
    size = engines.images_per_run(config.batch_size, streams)
    sizes = engines.run_sizes(len(range(world.rank, len(index), world.size)), size, streams)
    workers = parallel.dataloader_workers(config.workers, world.local_size)
    images = EvalLoader(
        index, transform, sizes, config.on_bad_image, world.rank, world.size, workers, device.pin_memory
    )
    return model, index, images


def prepare(spec: ModelSpec, config: EvalConfig, device: "Device", world: "World") -> "tuple[EvalModel, FolderIndex]":
    """Load the model and index the images; labels of the index are columns of the logits.

    Raises:
      UserError: the first mistake.
    """
    model = load_evaluated_model(spec, config, device, world.local_size, in_streams=True)
    return model, load_index(config, model, spec.background_columns(model.num_outputs))


def load_evaluated_model(
    spec: ModelSpec,
    config: EvalConfig,
    device: "Device | None" = None,
    local_size: int = 1,
    in_streams: bool = False,
) -> EvalModel:
    """Load what --resume names: a checkpoint, an .onnx or an .om file.

    Args:
      device: of a checkpoint; default: chosen by the options.
      local_size: ranks of this node.
      in_streams: several threads will call the classifier, see Engine.streams.
    Raises:
      UserError: the first mistake.
    """
    _check_engine(config, device.kind if device else config.device)
    if _is_exported(config):
        threads = config.threads or max(1, parallel.usable_cores() // local_size)
        is_on_cpu = config.resume.endswith(".onnx") and config.provider == "cpu"
        return _load_engine(spec, config, engines.streams(threads) if in_streams and is_on_cpu else 0)
    from common.device import device as devices

    device = device or devices.choose(config.device, config.device_id)
    return _load_checkpoint(spec, config, device, local_size, in_streams)


def _is_exported(config: EvalConfig) -> bool:
    return pathlib.Path(config.resume).suffix in _EXPORTED


def _check_engine(config: EvalConfig, device_kind: str) -> None:
    """Raise UserError for --engine or --fast with options that exclude them."""
    if config.engine != "default" or config.fast:
        plain = not config.compile and not config.aipp_config and config.provider == "cpu"
        engine_choice.check(config.engine, config.fast, config.resume, device_kind, plain)


def _check_exported(config: EvalConfig) -> None:
    """Raise UserError for options of checkpoints."""
    if config.use_ema is not None:
        raise UserError(f"--use-ema: {config.resume} is an exported model; the option belongs to checkpoints")
    if config.compile:
        raise UserError(f"--compile: {config.resume} is no checkpoint; leave it out")


def _check_network(spec: ModelSpec, config: EvalConfig, name: str) -> None:
    """Raise UserError for a file of another network, whose normalization and crop may differ; `name` may be empty."""
    if name and name != spec.name:
        raise UserError(f"{config.resume}: holds {printable(name)}, this program is for {spec.name}")


def _image_size(
    spec: ModelSpec, config: EvalConfig, shape: Sequence[int | str | None], metadata: onnx_metadata.OnnxMetadata
) -> int:
    """Side of the input of an exported file, pixels.

    Args:
      shape: of the input, CHW or HWC.
    Raises:
      UserError: --image-size, and the file is fixed to another one.
    """
    engines.check_image_size(config.resume, config.image_size, shape)
    sides = [side for side in shape if isinstance(side, int) and side != 3]
    return config.image_size or metadata.get("image_size") or max(sides, default=spec.input_size)


def _load_engine(spec: ModelSpec, config: EvalConfig, streams: int = 0) -> EvalModel:
    _check_exported(config)
    file = pathlib.Path(config.resume)
    if file.suffix == ".om" and file.is_file():
        _check_network(spec, config, om_session.read_record(file).get("arch", ""))
    engine = engines.open_engine(file, config.provider, config.device_id, config.threads, streams)
    _check_network(spec, config, onnx_metadata.network(engine.metadata))
    size = _image_size(spec, config, engine.sample_shape, engine.metadata)
    emulator = aipp.AippEmulator(config.aipp_config) if config.aipp_config else None
    classifier = engines.EngineClassifier(engine, spec, emulator)
    header = onnx_header.read(file) if file.suffix == ".onnx" else None
    name, precision = "ais_bench", "as compiled"
    if file.suffix == ".onnx":
        name, precision = "onnxruntime", engine_choice.precision_of(header) if header else engine_choice.FLOAT32
    return EvalModel(
        classifier, engine.num_outputs, size, engine.metadata.get("classes"), engine=name, precision=precision
    )


def _load_checkpoint(
    spec: ModelSpec, config: EvalConfig, device: "Device", local_size: int, in_streams: bool
) -> EvalModel:
    from common.device import device as devices
    from common.evaluation.torch_classifier import Normalizer, TorchClassifier, short_training

    if config.aipp_config:
        raise UserError(f"--aipp-config: {config.resume} is a checkpoint; AIPP belongs to .onnx models")
    options: dict[str, Any] = {"num_classes": config.num_classes}
    if config.transform_input is not None:
        if "transform_input" not in spec.build_options:
            raise UserError(f"--transform-input: {spec.name} has no such option")
        options["transform_input"] = config.transform_input
    threads = devices.set_threads(config.threads, local_size)
    model, meta = load_model(config.resume, spec, config.use_ema, **options)
    size = config.image_size or meta["image_size"]
    spec.check_image_size(size)
    # Memory format and precision of the training's own evaluation, where this device has them: equal accuracy.
    memory_format = device.memory_format("auto" if device.kind == "npu" else meta.get("memory_format") or "auto")
    device.move(model, memory_format)
    normalizer = Normalizer(spec, device, memory_format)
    network = device.compile_for_evaluation(model) if config.compile else model
    amp_type = device.stored_amp_type(meta.get("amp_type"))
    compiled_batch = config.batch_size if config.compile else 0
    own_threads = threads if in_streams and device.kind == "cpu" and not config.compile else 0
    classifier = TorchClassifier(network, normalizer, device, amp_type, compiled_batch, own_threads)
    precision = {"bf16": engine_choice.BFLOAT16, "fp16": "float16"}.get(amp_type or "", engine_choice.FLOAT32)
    return EvalModel(
        classifier,
        meta["num_classes"],
        size,
        meta["classes"],
        meta["taken"],
        meta.get("config") or {},
        precision=precision,
        short_training=short_training(model),
    )


def load_index(config: EvalConfig, model: EvalModel, label_offset: int) -> "FolderIndex":
    """Index of DATA/val, or of DATA itself; labels are columns of the logits.

    Raises:
      UserError: images and labels that do not fit the model.
    """
    from common.data import exclude, file_tree, index, packed

    root, num_classes = pathlib.Path(config.data), model.num_outputs - label_offset
    folder = root / "val" if (root / "val").is_dir() else root
    if folder == root and (root / "train").is_dir() and file_tree.class_names(str(root))[0] == ["train"]:
        raise UserError(
            f"--data: {root} has a train/ but no val/, whose images are evaluated{index.how_to_divide(str(root))}"
        )
    label_file = folder.parent / "val_label.txt"
    if label_file.is_file():
        train = root / "train"
        classes = model.classes or (file_tree.class_names(str(train))[0] if train.is_dir() else ())
        if not classes and packed.is_packed(train):
            classes = packed.read_manifest(train, "--data")["classes"]
        found = index.load_flat(folder, label_file, classes=classes, numbers=config.label_numbers)
        labels.check_range(found.labels, num_classes, label_file)
    else:
        found = index.load_folder(folder)
        if model.classes:
            found = index.in_classes(found, model.classes, where=str(folder), of="the model")
        elif len(found.classes) != num_classes:
            raise UserError(
                f"--data: {folder} has {len(found.classes)} class folders, the model has {num_classes} classes"
            )
    found = index.apply_exclude_list(found, exclude.read(config.exclude), is_dataset_root=folder == root)
    return dataclasses.replace(found, labels=found.labels + label_offset)
