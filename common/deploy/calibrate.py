"""Ranges of a network's activations over calibration images: min-max, entropy and percentile from one collection.

ONNX Runtime's collectors do the statistics. A first pass finds the extremes, a second one fills histograms between
them; both are stored after every batch, and an interrupted collection goes on from there.
"""

import contextlib
import io
import itertools
import pathlib
import typing
import zipfile
from collections.abc import Callable, Iterable

import numpy as np

from common.evaluation import engines
from common.files import atomic_path
from common.progress import Progress

if typing.TYPE_CHECKING:
    import onnx

METHODS = ("minmax", "entropy", "percentile")
BINS = 1024  # of a histogram, symmetric about zero
ENTROPY_BINS = 512  # the search for a threshold takes quadratic time
PERCENTILE = 99.999
Ranges = dict[str, tuple[np.ndarray, np.ndarray]]  # tensor -> lowest, highest value


def calibrated_tensors(proto: "onnx.ModelProto") -> list[str]:
    """Float tensors whose range quantization needs: not the inputs of a Relu alone, which takes their place."""
    import onnx

    inferred = {value.name: value for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)}
    weights = {tensor.name for tensor in proto.graph.initializer}
    readers: dict[str, list[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    names = dict.fromkeys(itertools.chain.from_iterable((*node.input, *node.output) for node in proto.graph.node))
    return [
        name
        for name in names
        if name in inferred
        and name not in weights
        and inferred[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        and readers.get(name) != ["Relu"]
    ]


def open_session(proto: "onnx.ModelProto", tensors: Iterable[str]) -> typing.Any:
    """Session that also returns inner `tensors`; `proto` has inferred shapes."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    known = {value.name: value for value in copy.graph.value_info}
    copy.graph.output.extend(known[name] for name in tensors if name in known)
    return engines.cpu_session(copy)


class Calibration:
    """Statistics of the activations of `proto` over batches of its input.

    Args:
      batches: number -> images [N, C, H, W]; called once for each number below `num_batches` in each pass.
      store: file that keeps what was collected; `key` says for which model and images.
    """

    def __init__(
        self,
        proto: "onnx.ModelProto",
        batches: Callable[[int], np.ndarray],
        num_batches: int,
        store: pathlib.Path,
        key: str,
    ) -> None:
        self._proto, self._batches, self._num_batches = proto, batches, num_batches
        self._store, self._key = store, key
        self._tensors = calibrated_tensors(proto)  # the input first
        assert self._tensors[0] == proto.graph.input[0].name
        self._done = 0  # batches of both passes
        self._limits = np.zeros((len(self._tensors), 2), np.float32)
        self._counts = np.zeros((len(self._tensors), BINS), np.int64)
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            kept = np.load(store)
            if str(kept["key"]) == key:
                self._limits, self._counts, self._done = kept["limits"], kept["counts"], int(kept["done"])
                print(f"calibration: goes on after {self._done} of {2 * num_batches} batches ({store})", flush=True)

    def collect(self, with_histograms: bool = True) -> None:
        """Both passes, or the first one."""
        end = (2 if with_histograms else 1) * self._num_batches
        if self._done >= end:
            return
        session, collector = open_session(self._proto, self._tensors[1:]), None
        with Progress(end, "calibration batches") as advance:
            advance(self._done)
            while self._done < end:
                images = self._batches(self._done % self._num_batches)
                found = [images, *session.run(self._tensors[1:], {self._tensors[0]: images})]
                if self._done < self._num_batches:
                    limits = np.array([(values.min(), values.max()) for values in found], np.float32)
                    if self._done:
                        limits[:, 0] = np.minimum(limits[:, 0], self._limits[:, 0])
                        limits[:, 1] = np.maximum(limits[:, 1], self._limits[:, 1])
                    self._limits = limits
                else:
                    collector = collector or self._collector("entropy", BINS)
                    with contextlib.redirect_stdout(io.StringIO()):
                        collector.collect(dict(zip(self._tensors, found, strict=True)))
                    self._counts = np.stack([collector.histogram_dict[name][0] for name in self._tensors])
                self._done += 1
                with atomic_path(self._store, ".tmp.npz") as draft:
                    np.savez(draft, key=self._key, done=self._done, limits=self._limits, counts=self._counts)
                advance(1)

    def _collector(self, method: str, num_bins: int) -> typing.Any:
        """ONNX Runtime's collector with what was counted; its histograms reach to the extremes, so that none grows."""
        from onnxruntime.quantization.calibrate import HistogramCollector

        collector = HistogramCollector(method, False, num_bins, 128, PERCENTILE, "same")
        for name, (low, high), counts in zip(self._tensors, self._limits, self._counts, strict=True):
            threshold = np.float32(max(-low, high, 1e-6))
            edges = np.linspace(-threshold, threshold, num_bins + 1, dtype=np.float32)
            counts = counts.reshape(num_bins, -1).sum(axis=1)
            collector.histogram_dict[name] = (counts, edges, low, high, threshold)
        return collector

    def ranges(self, method: str) -> Ranges:
        """The range of each tensor by one of METHODS."""
        limits = dict(zip(self._tensors, self._limits, strict=True))
        if method == "minmax":
            return {name: (low, high) for name, (low, high) in limits.items()}
        collector = self._collector(method, ENTROPY_BINS if method == "entropy" else BINS)
        with contextlib.redirect_stdout(io.StringIO()):
            found = collector.compute_collection_result()
        return {  # never wider than what occurs
            name: (max(low, limits[name][0]), min(high, limits[name][1])) for name, (low, high, *_) in found.items()
        }
