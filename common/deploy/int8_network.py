"""An int8 network of a float graph by ONNX Runtime's static quantization, with weights of common.deploy.rounding."""

import contextlib
import logging
import pathlib
import typing
import zipfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from common import files
from common.deploy import calibrate, int8_graph, rounding

if typing.TYPE_CHECKING:
    import onnx

# Operators with int8 kernels in ONNX Runtime. The last pool and the classifier stay in float32: they take no time, and
# their rounding errors go straight into the logits.
OPERATORS = ("Conv", "Relu", "Clip", "MaxPool", "AveragePool", "Concat", "Add")
INTEGERS, SCALES = "_quantized", "_scale"  # that ONNX Runtime appends to the name of a weight


class Int8Network:
    """A float graph, the ranges of its activations and its rounded weights, from which int8 networks are made.

    Args:
      proto: of int8_graph.prepare, with inferred shapes.
      moments, factors: see rounding.rounded_weights.
      batches: number -> calibration images [N, C, H, W].
      folder: keeps what was collected; `key` says for which model, images and settings.
      reduce_range: weights of 7 bits.
    """

    def __init__(
        self,
        proto: "onnx.ModelProto",
        batches: Callable[[int], np.ndarray],
        num_batches: int,
        folder: pathlib.Path,
        key: str,
        reduce_range: bool,
        moments: rounding.Moments,
        factors: Mapping[str, np.ndarray],
    ) -> None:
        self.proto, self._reduce_range = proto, reduce_range
        self._moments, self._factors = moments, factors
        self._batches, self._num_batches, self._folder, self._key = batches, num_batches, folder, key
        self._base: onnx.ModelProto | None = None
        self._ranges: dict[str, calibrate.Ranges] = {}
        self._rounded: dict[str, np.ndarray] = {}  # weight -> integers

    def calibrate(self, with_histograms: bool) -> None:
        """Collect the ranges and round the weights by the calibration images, or read what was kept of that."""
        files.make_folders(self._folder, "OUT")
        store = self._folder / "calibration.npz"
        self._calibration = calibrate.Calibration(self.proto, self._batches, self._num_batches, store, self._key)
        self._calibration.collect(with_histograms)
        store = self._folder / "rounded.npz"
        if (kept := read_kept(store, self._key)) is not None:
            self._rounded = kept
            return
        nearest = _quantized_weights(self.quantized("minmax", ()))
        self._rounded = rounding.rounded_weights(self.proto, nearest, self._moments, self._factors)
        keep(store, self._key, self._rounded)

    def quantized(
        self, method: str, float_layers: Sequence[str], operators: Sequence[str] = OPERATORS
    ) -> "onnx.ModelProto":
        """The int8 network by one of calibrate.METHODS; `float_layers` keep their weights."""
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.calibrate import TensorData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

        logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime recommends its own preprocessing
        if self._base is None:
            self._base = save_and_reload_model_with_shape_infer(self.proto)
        if method not in self._ranges:
            self._ranges[method] = self._calibration.ranges(method)
        ranges = {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in self._ranges[method].items()
        }
        for node in self._base.graph.node:
            if node.op_type == "Relu":  # its range is that of its input, which was not collected
                ranges.setdefault(node.input[0], ranges[node.output[0]])
        copy = onnx.ModelProto()
        copy.CopyFrom(self._base)
        quantizer = QDQQuantizer(
            copy,
            True,  # per channel
            self._reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8,
            ranges,
            [],
            list(float_layers),
            list(operators),
            {},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()  # onnx.checker asks for it
        proto = quantizer.model.model
        int8_graph.keep_float(proto, float_layers)
        for tensor in proto.graph.initializer:
            name = tensor.name.removesuffix(INTEGERS)
            if name != tensor.name and name in self._rounded:
                tensor.CopyFrom(onnx.numpy_helper.from_array(self._rounded[name], tensor.name))
        return proto


def read_kept(store: pathlib.Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays that `keep` wrote with the same key."""
    with (
        contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile),
        np.load(store) as kept,
    ):
        if str(kept["key"]) == key:
            return {name: kept[name] for name in kept.files if name != "key"}
    return None


def keep(store: pathlib.Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, with the key of the model, images and settings that they follow from."""
    with files.atomic_path(store, ".tmp.npz") as draft:
        np.savez(draft, key=key, **arrays)  # type: ignore[arg-type]


def _quantized_weights(proto: "onnx.ModelProto") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weight -> int8 integers and scales [O] of a QDQ network."""
    import onnx

    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    array = onnx.numpy_helper.to_array
    return {
        name.removesuffix(INTEGERS): (array(tensor), array(found[name.removesuffix(INTEGERS) + SCALES]))
        for name, tensor in found.items()
        if name.endswith(INTEGERS) and tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    }
