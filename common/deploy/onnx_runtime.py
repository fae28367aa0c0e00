"""run_onnx.py: ais_bench's options, result files, summary and throughput line, on ONNX Runtime."""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import cli
from common.deploy import file_names, result_files, simulate_fp16
from common.errors import UserError
from common.evaluation import aipp, engines, onnx_metadata
from common.progress import Progress

PREFETCH_BATCHES = 2
MAX_SIMULATED = 100  # input files of --simulate-fp16, which takes several times as long as inference


@dataclasses.dataclass(frozen=True)
class RunOnnxConfig(result_files.InferenceConfig):
    """Options of tools/run_onnx.py."""

    device: int = cli.option(0, "index of the provider's device", low=0, high=255)
    provider: str = cli.option("cpu", "ONNX Runtime's execution provider", choices=tuple(engines.PROVIDERS))
    threads: int = cli.option(0, "cores of one run; 0 is all", low=0)
    aipp_config: str = cli.option(
        "", "AIPP file: input files are uint8 HWC, normalized as the device would, in float16"
    )
    image_size: int | None = cli.option(None, "side of the input of a model that leaves it open, pixels", low=1)
    simulate_fp16: bool = cli.option(False, "print what float16 on the device does to each layer, and to the top-1")
    layers: int = cli.option(20, "layers that --simulate-fp16 lists, largest error first; 0 is all", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.simulate_fp16 and not self.input:
            raise UserError("--simulate-fp16: needs --input, a folder of preprocess.py")
        if self.simulate_fp16 and (self.output or self.provider != "cpu"):
            raise UserError(
                "--simulate-fp16: prints a table and computes on the CPU; leave out --output and --provider"
            )


def main(description: str) -> None:
    """Body of tools/run_onnx.py."""
    with cli.exit_on_error():
        config, _ = cli.parse(RunOnnxConfig(), description)
        if not config.model.endswith(".onnx"):
            raise UserError(f"--model: {config.model} is no .onnx file")
        run(config)


def run(config: RunOnnxConfig) -> None:
    """Run a model over input files, or over synthetic input.

    Raises:
      UserError: model, inputs and options that do not fit together; a run that fails removes its results.
    """
    engine = engines.open_engine(config.model, config.provider, config.device, config.threads)
    batch = config.resolve_batch(engine.batch) or 1
    loader = InputLoader(engine, config)
    files = result_files.list_inputs(config.input) if config.input else []
    result_files.check_network(files, onnx_metadata.network(engine.metadata))
    result_files.check_sizes(files, loader.sample_bytes, loader.description)
    result_files.check_layout(files, loader.shape)
    if config.simulate_fp16:
        _simulate_fp16(config, loader, files, batch)
        return
    with contextlib.ExitStack() as stack:
        folder = summary = None
        if config.output:
            folder, summary = stack.enter_context(result_files.output_folder(config.output, config.output_dirname))
            print(f"[INFO] output path:{folder}")
        inference = Inference(config, engine, loader, batch, folder)
        try:
            if files:
                inference.run_files(files)
            else:
                inference.run_synthetic()
        except BaseException:
            if folder is not None:
                shutil.rmtree(folder)  # output_folder made it, or found it empty
            raise
        if summary is not None:
            result_files.write_summary(summary, inference.filesinfo, sys.argv, inference.compute_ms, batch)
    _print_summary(inference.compute_ms, batch)


def _simulate_fp16(config: RunOnnxConfig, loader: "InputLoader", files: Sequence[pathlib.Path], batch: int) -> None:
    """Print the errors of the layers over input files, at most MAX_SIMULATED of them, evenly spaced."""
    chosen = files[:: -(-len(files) // MAX_SIMULATED)]
    print(f"[INFO] float16 simulation of {len(chosen)} of {len(files)} files", flush=True)
    simulation = simulate_fp16.Simulation(config.model, config.threads)
    with Progress(len(chosen), "images") as advance:
        for i in range(0, len(chosen), batch):
            part = chosen[i : i + batch]
            simulation.run(loader.load(part, batch), [path.name for path in part])
            advance(len(part))
    print("\n".join(simulation.report(config.layers)), flush=True)


class InputLoader:
    """Reads input files into batches of the model's input.

    Attributes:
      model_shape: of one image in the model's input.
      shape, dtype: of one input file; uint8 [H, W, 3] with --aipp-config, otherwise as the model's input.
      sample_bytes: bytes of one input file, without an .npy header.
      description: dtype and shape of an input file, for messages.
    """

    def __init__(self, engine: engines.Engine, config: RunOnnxConfig) -> None:
        engines.check_image_size(config.model, config.image_size, engine.sample_shape)
        size = config.image_size or engine.metadata.get("image_size")
        shape = [side if isinstance(side, int) else size for side in engine.sample_shape]
        self.model_shape = [side for side in shape if side is not None]
        if len(self.model_shape) < len(shape):
            raise UserError(f"--image-size: {config.model} leaves it open ({engine.sample_shape}); give it in pixels")
        self.model_dtype = engine.dtype
        self.aipp = aipp.AippEmulator(config.aipp_config) if config.aipp_config else None
        self.shape = [*self.model_shape[1:], 3] if self.aipp else self.model_shape
        self.dtype = np.dtype(np.uint8) if self.aipp else engine.dtype
        self.sample_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.description = f"{self.dtype} {'x'.join(map(str, self.shape))}"
        if not self.aipp:
            self.description += "; uint8 files need --aipp-config"

    def load(self, files: Sequence[pathlib.Path], batch: int) -> np.ndarray:
        """Read one batch; like ais_bench, fill up a short one with its first file."""
        samples = np.empty((batch, *self.shape), self.dtype)
        for i in range(batch):
            result_files.load_sample(files[i if i < len(files) else 0], samples[i])
        if self.aipp is None:
            return samples
        images = np.empty((batch, *self.model_shape), self.model_dtype)
        for planes, pixels in zip(images, samples, strict=True):
            self.aipp.normalize_into(planes, pixels)
        return images


@dataclasses.dataclass
class Inference:
    """The runs of one program.

    Attributes:
      batch: images per run.
      folder: of the results; None: none are written.
      compute_ms: time of every run that counts.
      filesinfo: of the summary.
    """

    config: RunOnnxConfig
    engine: engines.Engine
    loader: InputLoader
    batch: int
    folder: pathlib.Path | None
    compute_ms: list[float] = dataclasses.field(default_factory=list)
    filesinfo: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run_files(self, files: Sequence[pathlib.Path]) -> None:
        """Read and write files in threads while the network runs; all three release the GIL."""
        batches = [files[i : i + self.batch] for i in range(0, len(files), self.batch)]
        print(f"[INFO] {len(files)} files, {self.batch} per run, {len(batches)} runs", flush=True)
        writes: list[concurrent.futures.Future[None]] = []
        with (
            concurrent.futures.ThreadPoolExecutor(1) as reader,
            concurrent.futures.ThreadPoolExecutor(1) as writer,
            Progress(len(files), "images") as advance,
        ):
            reads = [reader.submit(self.loader.load, each, self.batch) for each in batches[:PREFETCH_BATCHES]]
            for number, each in enumerate(batches):
                images = reads.pop(0).result()
                if number + PREFETCH_BATCHES < len(batches):
                    reads.append(reader.submit(self.loader.load, batches[number + PREFETCH_BATCHES], self.batch))
                if number == 0:
                    self._warm_up(images)
                logits = self._run_timed(images)
                if self.folder is not None:
                    writes.append(writer.submit(self._write_batch, self.folder, each, logits, number * self.batch))
                    while len(writes) > PREFETCH_BATCHES:
                        writes.pop(0).result()
                advance(len(each))
            for write in writes:
                write.result()

    def run_synthetic(self) -> None:
        """ais_bench's pure inference: one batch of --pure-data-type."""
        images = np.zeros((self.batch, *self.loader.model_shape), self.loader.model_dtype)
        if self.config.pure_data_type == "random":
            pixels = np.asarray(np.random.default_rng(0).integers(0, 256, images.shape))
            images = (pixels / 127.5 - 1 if images.dtype != np.uint8 else pixels).astype(images.dtype)
        self._warm_up(images)
        logits = self._run_timed(images)
        if self.folder is not None:
            result_files.write_result(self.folder, "pure_infer_data", self.config.outfmt, logits[0])

    def _warm_up(self, images: np.ndarray) -> None:
        for _ in range(self.config.warmup_count):
            self.engine.run(images)

    def _run_timed(self, images: np.ndarray) -> np.ndarray:
        """Run a batch --loop times."""
        for _ in range(self.config.loop):
            start = time.perf_counter()
            logits = self.engine.run(images)
            self.compute_ms.append(1000 * (time.perf_counter() - start))
        return logits

    def _write_batch(self, folder: pathlib.Path, files: Sequence[pathlib.Path], logits: np.ndarray, first: int) -> None:
        for i, path in enumerate(files):
            out = result_files.write_result(folder, file_names.stem(path.name), self.config.outfmt, logits[i])
            self.filesinfo[str(first + i)] = {"infiles": [str(path)], "outfiles": [str(out)]}


def _print_summary(compute_ms: list[float], batch: int) -> None:
    """Print the lines that scripts read from ais_bench; throughput is in images per second of the network alone."""
    stats = result_files.statistics(compute_ms)
    values = ", ".join(f"{key} = {stats[key]}" for key in ("min", "max", "mean", "median", "percentile(99%)"))
    print("[INFO] -----------------Performance Summary------------------")
    print(f"[INFO] NPU_compute_time (ms): {values}")
    print(
        f"[INFO] throughput 1000*batchsize.mean({batch})/NPU_compute_time.mean({stats['mean']}): "
        f"{1000 * batch / stats['mean']}"
    )
    print("[INFO] ------------------------------------------------------", flush=True)
