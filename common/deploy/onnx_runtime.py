"""ais_bench's job on ONNX Runtime: the same options, result files, summary and throughput line."""

import concurrent.futures
import dataclasses
import shutil
import sys
import time

import numpy as np

from common import cli
from common.deploy import result_files
from common.errors import UserError
from common.evaluation import aipp, engines
from common.progress import Progress

BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class RunConfig(result_files.RunOptions):
    """Options of tools/run_onnx.py."""

    device: int = cli.option(0, "index of the provider's device", low=0, high=255)
    provider: str = cli.option("cpu", "ONNX Runtime's execution provider", choices=tuple(engines.PROVIDERS))
    threads: int = cli.option(0, "cores of one run; 0 is all", low=0)
    aipp_config: str = cli.option(
        "", "AIPP file: input files are uint8 HWC, normalized as the device would, in float16"
    )
    image_size: int | None = cli.option(None, "side of the input of a model that leaves it open, pixels", low=1)


def main(description, argv=None):
    """Body of tools/run_onnx.py."""
    with cli.exit_on_error():
        config, _ = cli.parse(RunConfig(), description, argv)
        if not config.model:
            raise UserError("--model: missing, it needs an .onnx file")
        if not config.model.endswith(".onnx"):
            raise UserError(f"--model: {config.model} is no .onnx file")
        run(config)


def run(config):
    """Run a model over a data set, or over made-up data.

    Returns:
      (folder or None, images per second of the network alone).
    Raises:
      UserError: model, inputs and options that do not fit together; the folder of a failed run is removed again.
    """
    engine = engines.open_engine(config.model, config.provider, config.device, config.threads)
    batch = batch_size(engine, config)
    source = Source(engine, config)
    files = result_files.list_inputs(config.input) if config.input else []
    if files:
        result_files.check_sizes(files, source.sample_bytes, source.in_words())
    folder = summary = None
    if config.output:
        folder, summary = result_files.claim_output(config.output, config.output_dirname)
        print(f"[INFO] output path:{folder}")
    try:
        compute_ms, filesinfo = (
            _run_files(engine, source, files, batch, folder, config)
            if files
            else _run_pure(engine, source, batch, folder, config)
        )
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder)  # it was empty, or not there, when this run began
        raise
    mean = float(np.mean(compute_ms))
    if summary is not None:
        result_files.write_summary(summary, filesinfo, sys.argv, compute_ms, batch)
    _print_summary(compute_ms, batch)
    return folder, 1000 * batch / mean


def batch_size(engine, config):
    """Images per run: a fixed model's own, which an explicit --batchsize must equal."""
    if engine.batch and config.batchsize and engine.batch != config.batchsize:
        raise UserError(f"--batchsize: {config.batchsize}, but {config.model} is fixed to {engine.batch}")
    return engine.batch or config.batchsize or 1


class Source:
    """Shape, type and arithmetic of the input files of a run.

    Attributes:
      sample_bytes: what one file holds, without an .npy header.
    """

    def __init__(self, engine, config):
        size = config.image_size or engine.metadata.get("image_size")
        self.model_shape = [side if isinstance(side, int) else size for side in engine.sample_shape]
        if None in self.model_shape:
            raise UserError(f"--image-size: {config.model} leaves it open ({engine.sample_shape}); give it in pixels")
        self.model_dtype = engine.dtype
        self.aipp = aipp.AippEmulator(config.aipp_config) if config.aipp_config else None
        self.shape = [*self.model_shape[1:], 3] if self.aipp else self.model_shape
        self.dtype = np.dtype(np.uint8) if self.aipp else engine.dtype
        self.sample_bytes = int(np.prod(self.shape)) * self.dtype.itemsize

    def in_words(self):
        hint = "" if self.aipp else "; uint8 files need --aipp-config"
        return f"{self.dtype} {'x'.join(map(str, self.shape))}{hint}"

    def load(self, files, batch):
        """Read one batch; a short one is filled up with its own first file, as ais_bench does."""
        pixels = np.empty((batch, *self.shape), self.dtype)
        for i in range(batch):
            result_files.load_sample(files[i if i < len(files) else 0], pixels[i])
        if self.aipp is None:
            return pixels
        images = np.empty((batch, *self.model_shape), self.model_dtype)
        for planes, sample in zip(images, pixels, strict=True):
            self.aipp.normalize_into(planes, sample)
        return images


def _timed(engine, images, loop, compute_ms):
    for _ in range(loop):
        start = time.perf_counter()
        logits = engine.run(images)
        compute_ms.append(1000 * (time.perf_counter() - start))
    return logits


def _run_files(engine, source, files, batch, folder, config):
    """Read ahead and write behind in threads, while the network runs; all three let go of the interpreter."""
    batches = [files[i : i + batch] for i in range(0, len(files), batch)]
    print(f"[INFO] {len(files)} files, {batch} per run, {len(batches)} runs", flush=True)
    compute_ms, filesinfo, writes = [], {}, []
    with (
        concurrent.futures.ThreadPoolExecutor(1) as reader,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
        Progress(len(files), "images") as advance,
    ):
        ahead = [reader.submit(source.load, each, batch) for each in batches[:BATCHES_AHEAD]]
        for number, each in enumerate(batches):
            images = ahead.pop(0).result()
            if number + BATCHES_AHEAD < len(batches):
                ahead.append(reader.submit(source.load, batches[number + BATCHES_AHEAD], batch))
            if number == 0:
                for _ in range(config.warmup_count):
                    engine.run(images)
            logits = _timed(engine, images, config.loop, compute_ms)
            if folder is not None:
                arguments = (folder, config.outfmt, each, logits, number * batch, filesinfo)
                writes.append(writer.submit(_write_batch, *arguments))
                while len(writes) > BATCHES_AHEAD:
                    writes.pop(0).result()
            advance(len(each))
        for write in writes:
            write.result()
    return compute_ms, filesinfo


def _write_batch(folder, outfmt, files, logits, first, filesinfo):
    for i, path in enumerate(files):
        out = result_files.write_result(folder, path.name.partition(".")[0], outfmt, logits[i])
        filesinfo[str(first + i)] = {"infiles": [str(path)], "outfiles": [str(out)]}


def _run_pure(engine, source, batch, folder, config):
    images = np.zeros((batch, *source.model_shape), source.model_dtype)
    if config.pure_data_type == "random":
        pixels = np.random.default_rng(0).integers(0, 256, images.shape)
        images = (pixels / 127.5 - 1).astype(images.dtype) if images.dtype != np.uint8 else pixels.astype(np.uint8)
    for _ in range(config.warmup_count):
        engine.run(images)
    compute_ms = []
    logits = _timed(engine, images, config.loop, compute_ms)
    if folder is not None:
        result_files.write_result(folder, "pure_infer_data", config.outfmt, logits[0])
    return compute_ms, {}


def _print_summary(compute_ms, batch):
    stats = result_files.statistics(compute_ms)
    words = ", ".join(f"{key} = {stats[key]}" for key in ("min", "max", "mean", "median", "percentile(99%)"))
    print("[INFO] -----------------Performance Summary------------------")
    print(f"[INFO] NPU_compute_time (ms): {words}")
    print(result_files.throughput_line(batch, stats["mean"]))
    print("[INFO] ------------------------------------------------------", flush=True)
