"""--engine and --fast of eval.py: which engine, precision and number of threads computes on a CPU.

A choice is measured once for a machine, a model file and versions of the engines, and kept in the cache.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import time
import typing
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from common import cpuinfo, files, parallel
from common.data import cache
from common.data.decode import BadImage
from common.errors import UserError
from common.evaluation import comparison, engines, onnx_conversion, onnx_header, onnx_metadata, openvino_engine
from common.evaluation.engines import EngineClassifier, OnnxEngine
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
_TIMED, _TURNS = 8, 4  # images of a measured run, and how many each way gets; the fastest counts
_QUANTIZED = ("uantizeLinear", "QLinearConv", "ConvInteger")  # in the names of operators of an int8 file
_RULES = 6  # raise it when other ways are measured: choices of other rules are made again


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


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
      file: checkpoint or .onnx file.
      own: how it is computed by default.
      size: side of the input, pixels.
      batch_size: images per run, at most.
      variant: options that change the network of a file.
      device: of `network`.
      network: of a checkpoint; None where `converted` replaces it.
      converted: what engines other than torch read of a checkpoint, where it is in the cache.
      facts: to keep with a converted checkpoint.
      content: hash of the file; computed where it is not given.
      load_s: seconds to import torch and load `network`, which a start with a converted checkpoint does not take.
    """

    spec: ModelSpec
    file: pathlib.Path
    own: Way
    size: int
    batch_size: int
    variant: Sequence[object]
    device: "Device | None" = None
    network: "torch.nn.Module | None" = None
    converted: onnx_conversion.Converted | None = None
    facts: Mapping[str, typing.Any] = dataclasses.field(default_factory=dict)
    content: str = ""
    load_s: float = 0.0

    @property
    def is_onnx(self) -> bool:
        return self.file.suffix == ".onnx"

    def __post_init__(self) -> None:
        if not self.content:
            object.__setattr__(self, "content", files.sha256(self.file))

    @property
    def conversion_key(self) -> str:
        """Key of the converted checkpoint in the cache."""
        return onnx_conversion.key(self.content, self.spec, self.variant, versions("torch", "onnx"))

    def named(self, engine: str) -> Way:
        """The way of an engine that was named: a checkpoint in float32, a file as it was exported."""
        return Way(engine, self.own.precision if self.is_onnx else FLOAT32, self.own.threads)

    def build(self, way: Way) -> "Classifier":
        """The classifier that computes in this way."""
        streams = engines.streams(way.threads)
        if way.engine == "onnxruntime":
            return EngineClassifier(OnnxEngine(self.source(), threads=way.threads, streams=streams), self.spec)
        if way.engine == "openvino":
            is_float32 = way.precision != BFLOAT16
            engine = openvino_engine.OpenVinoEngine(self.source(), is_float32, way.threads, streams)
            return EngineClassifier(engine, self.spec)
        from common.evaluation.torch_classifier import Normalizer, TorchClassifier

        assert self.network is not None and self.device is not None
        self.device.move(self.network, "channels_last")
        amp_type = "bf16" if way.precision == BFLOAT16 else None
        normalizer = Normalizer(self.spec, self.device, "channels_last")
        return TorchClassifier(self.network, normalizer, self.device, amp_type, threads=way.threads)

    def source(self) -> pathlib.Path | bytes:
        """What ONNX Runtime and OpenVINO read; a checkpoint that was not converted before is converted now."""
        if self.is_onnx:
            return self.file
        found = self.converted or onnx_conversion.load(self.conversion_key)
        if found is None:
            assert self.network is not None
            found = onnx_conversion.convert(self.network, self.spec, self.size, self.conversion_key, self.facts)
        return found.proto

    def ways(self, engine: str, fast: bool) -> list[Way]:
        """The ways to measure; the default one first."""
        names = [engine]
        if engine in ("default", "auto"):
            names = ["onnxruntime"] if self.is_onnx else ["torch", "onnxruntime"]
            names += ["openvino"] if openvino_engine.is_installed() else []
        ways = [self.named(name) for name in names]
        if fast and multiplies_bfloat16():
            ways += [Way(name, BFLOAT16, self.own.threads) for name in names if name != "onnxruntime"]
        return [self.own, *(way for way in ways if way != self.own)]


def check(engine: str, fast: bool, file: str, device_kind: str, is_plain: bool) -> None:
    """Raise UserError for an --engine or --fast that cannot be used with a model file, or is not installed.

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
    if engine == "torch" and is_onnx:
        raise UserError(f"--engine: torch needs a checkpoint, {file} is none; give onnxruntime, openvino or auto")
    if engine == "openvino":
        openvino_engine.check_installed()


def precision_of(header: onnx_header.OnnxHeader) -> str:
    """Precision of an exported file, for print and metrics.json."""
    if any(name in operator for operator in header.operators for name in _QUANTIZED):
        return "int8"
    of_input = "float16" if header.inputs[0].dtype == "float16" else FLOAT32
    return onnx_metadata.decode(header.metadata).get("precision", of_input)


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; without them bfloat16 is slower than float32.

    True where the system does not say.
    """
    flags = cpuinfo.field("flags", "Features").split()
    return not flags or any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"))


def choose(
    subject: Subject,
    engine: str,
    fast: bool,
    index: "FolderIndex",
    transform: "Callable[[typing.Any], np.ndarray]",
) -> Choice:
    """The way to compute: the engine named, or the fastest one by a measurement, which is cached."""
    if engine not in ("default", "auto") and not fast:
        return Choice(subject.named(engine))
    if (found := kept(subject, engine, fast, index)) is not None:
        return found
    choice = _measure(subject, subject.ways(engine, fast), fast, _sample(index, transform), len(index))
    cache.write(_key(subject, engine, fast, index), dict(way=choice.way, note=choice.note), {})
    return choice


def kept(subject: Subject, engine: str, fast: bool, index: "FolderIndex") -> Choice | None:
    """The choice of an earlier start, or None."""
    stored = cache.read(_key(subject, engine, fast, index))
    if stored is None:
        return None
    way, note = stored[0].get("way"), stored[0].get("note")
    if not isinstance(way, list) or len(way) != len(Way._fields) or not isinstance(note, str):
        return None
    return Choice(Way(*way), note)


def _key(subject: Subject, engine: str, fast: bool, index: "FolderIndex") -> str:
    facts = [cpuinfo.field("model name") or platform.machine(), parallel.usable_cores(), subject.content, subject.own]
    facts += [versions("torch", "onnxruntime", "openvino"), subject.size, subject.batch_size, list(subject.variant)]
    facts += [engine, len(index), fast and index.fingerprint, _RULES]
    return f"engine choice {json.dumps(facts)}"


def versions(*packages: str) -> dict[str, str]:
    """Versions of those that are installed."""
    return {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name) is not None}


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
    """(Classifier, seconds to make it in later starts, which find a converted checkpoint in the cache)."""
    if way.engine != "torch":
        subject.source()
    start = time.perf_counter()
    classifier = subject.build(way)
    return classifier, time.perf_counter() - start + (subject.load_s if way.engine == "torch" else 0.0)


def _measure(subject: Subject, ways: Sequence[Way], fast: bool, pixels: np.ndarray, num_images: int) -> Choice:
    """The way that takes the least time for `num_images`; with `fast`, among those that agree with the default one."""
    classifiers: dict[Way, Classifier] = {}
    starts: dict[Way, float] = {}
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
            logits = _logits(classifier, pixels, subject.batch_size)
            reference = logits if reference is None else reference
            agreed, largest = _difference(reference, logits)
            if agreed < (1 - FAST_TOP1) * len(pixels) or largest > FAST_LOGITS:
                continue
            notes[way] = (
                f"; on {len(pixels)} images {agreed} have the same top-1 as with {ways[0]} (allowed: "
                f"{100 * (1 - FAST_TOP1):.0f} %), logits differ by at most {100 * largest:.2g} % of the largest "
                f"one (allowed: {100 * FAST_LOGITS:.0f} %)"
            )
        classifiers[way], starts[way] = classifier, start
        if way.threads >= 4:  # twice as many threads as cores, or decoding beside it
            half = way._replace(threads=way.threads // 2)
            classifiers[half], starts[half] = _timed_build(subject, half)
            notes[half] = notes.get(way, "")
    speeds = dict.fromkeys(classifiers, 0.0)
    for turn in range(_TURNS + 1):  # in turns: the speed of a machine changes
        for way, classifier in classifiers.items():
            rate = _images_per_s(classifier, pixels[:_TIMED], subject.batch_size)
            speeds[way] = max(speeds[way], rate) if turn else 0.0  # the first run is slower
    best = min(speeds, key=lambda way: starts[way] + num_images / speeds[way])
    speed = f"{speeds[best]:.3g} images/s" + (f", {ways[0]} {speeds[ways[0]]:.3g}" if best != ways[0] else "")
    flag = "--fast" if fast else "--engine auto"
    missing = "" if openvino_engine.is_installed() else "; openvino is not installed (pip install openvino)"
    return Choice(best, f"{flag}: {best} on {best.threads} threads: {speed}{notes.get(best, '')}{missing}")


def _difference(reference: np.ndarray, logits: np.ndarray) -> tuple[int, float]:
    """(Images with the same top-1, largest difference of a logit as a share of the largest logit)."""
    found = comparison.Comparison()
    found.add(reference, logits, np.zeros(len(logits), np.int64), (0, 0))
    return found.agreed, found.max_difference / max(float(np.abs(reference).max()), 1e-12)


def _logits(classifier: "Classifier", pixels: np.ndarray, batch_size: int) -> np.ndarray:
    """Logits [N, K], computed as an evaluation does."""
    streams = getattr(classifier, "streams", 0)
    size = engines.images_per_run(batch_size, streams)
    parts = [pixels[i : i + size] for i in range(0, len(pixels), size)]
    return np.concatenate(list(parallel.in_order(classifier, parts, streams)))


def _images_per_s(classifier: "Classifier", pixels: np.ndarray, batch_size: int) -> float:
    start = time.perf_counter()
    _logits(classifier, pixels, batch_size)
    return len(pixels) / (time.perf_counter() - start)
