"""--engine and --fast of eval.py: which engine, precision and number of threads computes on a CPU.

A choice is measured once for a machine, a model file and versions of the engines, and kept in the cache.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import mmap
import pathlib
import platform
import time
import typing
from collections.abc import Callable, Sequence

import numpy as np

from common import parallel
from common.data import cache
from common.data.decode import BadImage
from common.errors import UserError
from common.evaluation import comparison
from common.evaluation.engines import EngineClassifier, OnnxEngine
from common.evaluation.onnx_metadata import OnnxMetadata
from common.spec import ModelSpec

if typing.TYPE_CHECKING:
    import torch

    from common.data.index import FolderIndex
    from common.device.device import Device
    from common.evaluation.evaluate import Classifier

ENGINES = ("default", "auto", "torch", "onnxruntime", "openvino")
FLOAT32, BFLOAT16 = "float32", "bfloat16"
# What --fast allows on the sample: images with another top-1, and the largest difference of a logit, both as shares.
FAST_TOP1, FAST_LOGITS = 0.02, 0.05
_SAMPLE = 64  # images compared by --fast
_TIMED = 8  # images of a measured run
_QUANTIZED = (b"uantizeLinear", b"QLinearConv", b"ConvInteger")  # operators of an int8 file


class Way(typing.NamedTuple):
    """How the logits are computed; threads 0: one per core."""

    engine: str
    precision: str
    threads: int = 0

    def __str__(self) -> str:
        return f"{self.engine} {self.precision}"


class Choice(typing.NamedTuple):
    """A Way, and a line on why it was chosen; empty where nothing was measured."""

    way: Way
    note: str = ""


class OpenVinoEngine:
    """OpenVINO on the CPU, as an Engine.

    Args:
      source: .onnx file, or a network.
      size: side of the input, pixels; used for a network.
    Raises:
      UserError: OpenVINO is not installed, or cannot load the file.
    """

    def __init__(self, source: "pathlib.Path | torch.nn.Module", size: int, precision: str, threads: int) -> None:
        if importlib.util.find_spec("openvino") is None:
            raise UserError("--engine: openvino is not installed; pip install openvino")
        import openvino

        self.metadata: OnnxMetadata = {}
        self.is_float32 = precision != BFLOAT16
        try:
            if isinstance(source, pathlib.Path):
                model = openvino.Core().read_model(source)
            else:
                import torch

                with torch.inference_mode():
                    model = openvino.convert_model(source, example_input=torch.zeros(1, 3, size, size))
            settings = {
                "INFERENCE_PRECISION_HINT": "f32" if self.is_float32 else "bf16",
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": str(threads or parallel.usable_cores()),
            }
            self._model = openvino.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise UserError(
                f"--engine: openvino cannot load {source}: {str(error).strip().splitlines()[-1]}"
            ) from error
        shape = self._model.input(0).get_partial_shape()
        sides = [side.get_length() if side.is_static else None for side in shape]
        self.batch: int | None = sides[0]
        self.sample_shape: Sequence[int | str | None] = (
            sides[1:] if isinstance(source, pathlib.Path) else (3, size, size)
        )
        self.dtype = np.dtype(self._model.input(0).get_element_type().to_dtype())
        self.num_outputs: int = self._model.output(0).get_partial_shape()[-1].get_length()

    def run(self, images: np.ndarray) -> np.ndarray:
        return np.array(self._model(np.asarray(images, self.dtype))[0])


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
      file: checkpoint or .onnx file.
      network: of a checkpoint.
      own: how it is computed by default.
      size: side of the input, pixels.
      batch_size: images per run.
      threads: of this process.
      variant: options that change the network of a file.
    """

    spec: ModelSpec
    device: "Device"
    file: pathlib.Path
    network: "torch.nn.Module | None"
    own: Way
    size: int
    batch_size: int
    threads: int
    variant: str

    def build(self, way: Way) -> "Classifier":
        """The classifier that computes in this way."""
        if way.engine == "onnxruntime":
            return EngineClassifier(OnnxEngine(self.file, threads=way.threads), self.spec)
        if way.engine == "openvino":
            source = self.file if self.network is None else self.network
            return EngineClassifier(OpenVinoEngine(source, self.size, way.precision, way.threads), self.spec)
        import torch

        from common.evaluation.torch_classifier import Normalizer, TorchClassifier

        assert self.network is not None
        torch.set_num_threads(way.threads)
        self.device.move(self.network, "channels_last")
        amp_type = "bf16" if way.precision == BFLOAT16 else None
        normalizer = Normalizer(self.spec, self.device, "channels_last")
        return TorchClassifier(self.network, normalizer, self.device, amp_type)

    def ways(self, engine: str, fast: bool) -> list[Way]:
        """The ways to measure; the default one first."""
        own = "onnxruntime" if self.network is None else "torch"
        names = [own, "openvino"] if engine in ("default", "auto") else [engine]
        if len(names) > 1 and importlib.util.find_spec("openvino") is None:
            names.remove("openvino")
        ways = [Way(name, FLOAT32, self.threads) for name in names]
        if fast:
            ways += [Way(name, BFLOAT16, self.threads) for name in names if name != "onnxruntime"]
        return [self.own, *(way for way in ways if way != self.own)]


def check(engine: str, fast: bool, file: str, device_kind: str, is_plain: bool) -> None:
    """Raise UserError for an --engine or --fast that cannot be used with a model file.

    Args:
      is_plain: no option that belongs to one engine only is given.
    """
    flag = "--fast" if engine == "default" else "--engine"
    if engine == "default" and not fast:
        return
    is_onnx = file.endswith(".onnx")
    if file.endswith(".om") or (not is_onnx and device_kind != "cpu"):
        raise UserError(f"{flag}: chooses among engines of a CPU; leave it out, or give --device cpu and no .om file")
    if not is_plain:
        raise UserError(f"{flag}: not with --compile, --aipp-config or a --provider; leave one of them out")
    wrong = "torch" if is_onnx else "onnxruntime"
    if engine == wrong:
        needs = "a checkpoint" if is_onnx else "an .onnx file, which the export script writes"
        raise UserError(f"--engine: {engine} needs {needs}, {file} is none; give openvino or auto")


def precision_of(file: pathlib.Path, dtype: np.dtype) -> str:
    """Precision of an exported file, for print and metrics.json."""
    with open(file, "rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as block:
        if any(block.find(name) >= 0 for name in _QUANTIZED):
            return "int8"
    return "float16" if dtype == np.float16 else FLOAT32


def choose(
    subject: Subject,
    engine: str,
    fast: bool,
    index: "FolderIndex",
    transform: "Callable[[typing.Any], np.ndarray]",
) -> Choice:
    """The way to compute: the engine named, or the fastest one by a measurement, which is cached."""
    if engine not in ("default", "auto") and not fast:
        return Choice(Way(engine, FLOAT32, subject.threads))
    key = _key(subject, engine, fast, index)
    stored = cache.read(key)
    if stored is not None:
        header = stored[0]
        return Choice(Way(*header["way"]), header["note"])
    choice = _measure(subject, subject.ways(engine, fast), fast, _sample(index, transform), len(index))
    cache.write(key, dict(way=choice.way, note=choice.note), {})
    return choice


def _key(subject: Subject, engine: str, fast: bool, index: "FolderIndex") -> str:
    name = hashlib.sha256(subject.file.read_bytes()).hexdigest()
    versions = {
        package: importlib.metadata.version(package)
        for package in ("torch", "onnxruntime", "openvino")
        if importlib.util.find_spec(package) is not None
    }
    facts = [_cpu(), parallel.usable_cores(), versions, name, subject.own, subject.size, subject.batch_size]
    facts += [subject.threads, subject.variant, engine, len(index), fast and index.fingerprint]
    return f"engine choice {json.dumps(facts)}"


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _sample(index: "FolderIndex", transform: "Callable[[typing.Any], np.ndarray]") -> np.ndarray:
    """Pixels [N, H, W, 3] of up to 64 images, spread over the set; files that do not decode are left out.

    Raises:
      BadImage: none of them decodes.
    """
    places = np.unique(np.linspace(0, len(index) - 1, _SAMPLE).astype(int))
    images, error = [], None
    for i in places:
        try:
            images.append(transform(index.image(int(i))))
        except BadImage as bad:
            error = bad
    if not images and error is not None:
        raise error
    return np.stack(images)


def _timed_build(subject: Subject, way: Way) -> "tuple[Classifier, float]":
    """(Classifier, seconds to make it): OpenVINO converts a checkpoint at every start."""
    start = time.perf_counter()
    return subject.build(way), time.perf_counter() - start


def _measure(subject: Subject, ways: Sequence[Way], fast: bool, pixels: np.ndarray, num_images: int) -> Choice:
    """The way that takes the least time for `num_images`; with `fast`, among those that agree with the default one."""
    import torch

    batch = torch.from_numpy(pixels)
    timed = batch[: min(_TIMED, subject.batch_size)]
    speeds: dict[Way, float] = {}
    seconds: dict[Way, float] = {}
    notes: dict[Way, str] = {}
    reference: np.ndarray | None = None
    for way in ways:
        try:
            classifier, start = _timed_build(subject, way)
        except UserError:
            if way == ways[0]:
                raise
            continue
        if fast:
            logits = np.concatenate([classifier(part) for part in batch.split(subject.batch_size)])
            reference = logits if reference is None else reference
            agreed, largest = _difference(reference, logits)
            if agreed < (1 - FAST_TOP1) * len(batch) or largest > FAST_LOGITS:
                continue
            notes[way] = (
                f"; on {len(batch)} images {agreed} have the same top-1 as with {ways[0]} (allowed: "
                f"{100 * (1 - FAST_TOP1):.0f} %), logits differ by at most {100 * largest:.2g} % of the largest "
                f"one (allowed: {100 * FAST_LOGITS:.0f} %)"
            )
        speeds[way] = _images_per_s(classifier, timed)
        seconds[way] = start + num_images / speeds[way]
        if way.threads >= 4:  # twice as many threads as cores, or decoding beside it
            half = way._replace(threads=way.threads // 2)
            classifier, start = _timed_build(subject, half)
            speeds[half], notes[half] = _images_per_s(classifier, timed), notes.get(way, "")
            seconds[half] = start + num_images / speeds[half]
    best = min(seconds, key=lambda way: seconds[way])
    speed = f"{speeds[best]:.3g} images/s" + (f", {ways[0]} {speeds[ways[0]]:.3g}" if best != ways[0] else "")
    flag = "--fast" if fast else "--engine auto"
    missing = "" if importlib.util.find_spec("openvino") else "; openvino is not installed (pip install openvino)"
    return Choice(best, f"{flag}: {best} on {best.threads} threads: {speed}{notes.get(best, '')}{missing}")


def _difference(reference: np.ndarray, logits: np.ndarray) -> tuple[int, float]:
    """(Images with the same top-1, largest difference of a logit as a share of the largest logit)."""
    found = comparison.Comparison()
    found.add(reference, logits, np.zeros(len(logits), np.int64), (0, 0))
    return found.agreed, found.max_difference / max(float(np.abs(reference).max()), 1e-12)


def _images_per_s(classifier: "Classifier", pixels: "torch.Tensor") -> float:
    """The better of two runs, after one that is not counted."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        classifier(pixels)
        times.append(time.perf_counter() - start)
    return len(pixels) / min(times[1:])
