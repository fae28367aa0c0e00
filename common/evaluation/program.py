"""Images -> accuracy without files between: decode, transform, any engine, score; decoding overlaps with inference."""

import dataclasses
import pathlib
import time

from common import cli
from common.errors import UserError
from common.evaluation import engines, metrics_json
from common.weights.load import load_model


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """Options of eval.py."""

    data: str = cli.option("", "folder with val/: class folders, or images beside val_label.txt")
    resume: str = cli.option(
        "", "what to evaluate: a checkpoint (torch), .onnx (ONNX Runtime) or .om (NPU)", "--ckpt", "--model"
    )
    exclude: str = cli.option("", "list of images to leave out, one path per line, as tools/check_data.py writes it")
    device: str = cli.option("auto", "device of a checkpoint", choices=("auto", "npu", "cuda", "cpu"))
    device_id: int = cli.option(0, "index of the device", low=0, high=255)
    provider: str = cli.option("cpu", "ONNX Runtime's execution provider", choices=tuple(engines.PROVIDERS))
    batch_size: int = cli.option(64, "images per run; a model of fixed batch keeps its own", "-b", low=1)
    workers: int = cli.option(2, "processes that decode", "-j", low=0)
    threads: int = cli.option(0, "cores of the network on a CPU; 0 is all", low=0)
    num_classes: int | None = cli.option(None, "columns of a checkpoint's output; cuts off a background class", low=1)
    image_size: int | None = cli.option(None, "side of the input, pixels (default: as stored)", low=1)
    transform_input: bool | None = cli.option(None, "convert ImageNet-normalized input to 0.5/0.5; default: as stored")
    full_fp32: bool = cli.option(False, "compute float32 in full: no HF32 on npu, no TF32 on cuda; for a checkpoint")
    aipp_config: str = cli.option("", "AIPP file: normalize as the device would, in float16")
    metrics_json: str = cli.option("", "file to write the accuracies to, as postprocess.py does")

    def __post_init__(self):
        cli.check_ranges(self)


def main(spec, description, recipe=None, argv=None):
    """Body of an eval script that takes every engine."""
    with cli.exit_on_error():
        config, _ = cli.parse(recipe or StreamConfig(), description, argv)
        for flag, value in (("--data", config.data), ("--resume", config.resume)):
            if not value:
                raise UserError(f"{flag}: missing")
        counts, num_outputs = evaluate_stream(spec, config)
        print(counts)
        print(metrics_json.table(counts))
        if config.metrics_json:
            metrics_json.write_metrics(config.metrics_json, counts, num_outputs)


def evaluate_stream(spec, config, smoothing=lambda num_outputs: 0.0, world=None):
    """Score the validation images of a folder.

    Args:
      spec: ModelSpec.
      config: StreamConfig.
      smoothing: number of columns -> label smoothing of the loss.
      world: distributed.World of this process; every rank scores its share and rank 0 prints.
    Returns:
      (Counts over all ranks, number of columns of the model).
    Raises:
      UserError: model, data and options that do not fit together, or a broken image (with its path).
    """
    from common import distributed
    from common.data.loader import EvalLoader, workers_per_process
    from common.data.transforms import eval_transform
    from common.device import device as devices
    from common.evaluation import evaluate

    world = world or distributed.World()
    device = devices.choose(config.device, world.local_rank if world.size > 1 else config.device_id)
    device.activate()
    if config.full_fp32:
        device.compute_float32_exactly()
    group = distributed.Group(world, device)
    engine, index, num_outputs, size = group.local_rank0_first(lambda: prepare(spec, config, device, world))
    group.check_same(f"{len(index)} images ({index.fingerprint})", "--data")
    loader = EvalLoader(
        index,
        eval_transform(spec, size),
        config.batch_size,
        "fail",
        world.rank,
        world.size,
        workers_per_process(config.workers, world.local_size),
        device.pins_memory,
    )
    start = time.perf_counter()
    try:
        counts = evaluate.evaluate(engine, loader, len(index), group, smoothing(num_outputs))
    finally:
        loader.close()
    group.close()
    seconds = time.perf_counter() - start
    if world.is_main:
        left_out = f" ({index.excluded} left out by --exclude)" if config.exclude else ""
        print(
            f"{config.resume}: {counts.seen} images of {config.data}{left_out} in {seconds:.1f} s "
            f"({counts.seen / seconds:.1f} images/s), {num_outputs} columns, {size} pixels",
            flush=True,
        )
    return counts, num_outputs


def prepare(spec, config, device, world):
    """(engine, index of the images, columns, image size): everything that can be wrong is found here."""
    engine, num_outputs, size, classes = _engine(spec, config, device, world)
    return engine, _index(config, classes, num_outputs, spec.background_columns(num_outputs)), num_outputs, size


def _engine(spec, config, device, world):
    """(function from uint8 batch to logits, columns, image size, class names or None) for the file to evaluate."""
    from common.device import device as devices
    from common.evaluation import aipp, torch_engine

    if pathlib.Path(config.resume).suffix in (".onnx", ".om"):
        engine = engines.open_engine(config.resume, config.provider, config.device_id, config.threads)
        size = config.image_size or engine.facts.get("image_size") or _side(engine, spec)
        table = aipp.lookup_table(aipp.read(config.aipp_config)) if config.aipp_config else None
        return engines.Pixels(engine, spec, table), engine.num_outputs, size, engine.facts.get("classes")
    if config.aipp_config:
        raise UserError(f"--aipp-config: {config.resume} is a checkpoint; AIPP belongs to .onnx models")
    devices.set_threads(config.threads, world.local_size)
    model, meta = load_model(config.resume, spec, num_classes=config.num_classes, **_input_option(spec, config))
    size = config.image_size or meta["image_size"]
    spec.check_image_size(size)
    # Layout and precision of the training's own evaluation, where the device has them: the accuracy is then the same.
    layout = device.memory_format("auto" if device.kind == "npu" else meta.get("memory_format") or "auto")
    amp_type = device.stored_amp_type(meta.get("amp_type"))
    model = model.to(device.torch, memory_format=devices.torch_memory_format(layout))
    engine = torch_engine.TorchEngine(model, torch_engine.Normalizer(spec, device, layout), device, amp_type)
    return engine, meta["num_classes"], size, meta["classes"]


def _input_option(spec, config):
    """--transform-input as an argument of weights.load."""
    if config.transform_input is None:
        return {}
    if "transform_input" not in spec.build_options:
        raise UserError(f"--transform-input: {spec.name} has no such option")
    return {"transform_input": config.transform_input}


def _side(engine, spec):
    """Side of the square input that a model fixes, wherever its channels are; the published one where it is open."""
    return max((side for side in engine.sample_shape if isinstance(side, int) and side != 3), default=spec.input_size)


def _index(config, classes, num_outputs, offset):
    """Index of ROOT/val, or of ROOT itself, whose labels are columns of the model."""
    from common.data import exclude, index

    root = pathlib.Path(config.data)
    folder = root / "val" if (root / "val").is_dir() else root
    label_file = folder.parent / "val_label.txt"
    if label_file.is_file():
        found = index.load_flat(folder, label_file)
    else:
        found = index.load_folder(folder)
        if classes:
            unknown = sorted(set(found.classes) - set(classes))
            if unknown:
                raise UserError(f"--data: {folder} has classes that the model lacks: {', '.join(unknown[:5])}")
            found = found.relabelled(classes)
        elif len(found.classes) != num_outputs - offset:
            raise UserError(
                f"--data: {folder} has {len(found.classes)} class folders, the model has {num_outputs - offset} classes"
            )
    if found.labels.max() + offset >= num_outputs:
        raise UserError(
            f"--data: label {found.labels.max()} in {label_file}, the model has {num_outputs - offset} classes"
        )
    found = index.leave_out(found, exclude.read(config.exclude), bare=folder == root)
    return dataclasses.replace(found, labels=found.labels + offset)
