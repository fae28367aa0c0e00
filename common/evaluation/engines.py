"""Inference engines of exported models: ONNX Runtime, and ais_bench's InferSession for OM files on an Ascend NPU.

Importing this module imports neither. Legend: N batch, C channel, H W pixel, K column of the logits.
"""

import copy
import functools
import pathlib
import threading
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import parallel
from common.data.batch import Array
from common.data.transforms import NormalizeInto, normalize_into
from common.errors import RunError, UserError
from common.evaluation import om_session, onnx_metadata
from common.evaluation.aipp import AippEmulator
from common.evaluation.onnx_metadata import OnnxMetadata
from common.spec import ModelSpec

if typing.TYPE_CHECKING:
    import onnx

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cann": "CANNExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
_MAX_STREAMS, _IMAGES_OF_STREAM = 4, 4
INPUT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


class Engine(typing.Protocol):
    """A loaded model with one input and logits as its first output.

    Attributes:
      sample_shape: shape of the input without the batch axis; an open axis is None or its name.
      dtype: of the input; uint8 means that the model normalizes by itself (AIPP).
      batch: the fixed batch size, or None.
      num_outputs: columns of the logits.
      metadata: empty where the file has none.
      streams: runs at a time, in threads, for which it was opened; 0: one.
    """

    streams: int
    sample_shape: Sequence[int | str | None]
    dtype: np.dtype
    batch: int | None
    num_outputs: int
    metadata: OnnxMetadata

    def run(self, images: np.ndarray) -> np.ndarray:
        """[N, *sample_shape] -> logits [N, K]."""


def streams(threads: int) -> int:
    """How many runs share the threads of a CPU in an evaluation; 0: one run at a time, in the calling thread.

    A run of one thread waits for no other thread: on two cores, two runs of one thread each take 3 to 10 % less
    processor time than runs of two threads.
    """
    return min(threads, _MAX_STREAMS) if threads > 1 else 0


def images_per_run(batch_size: int, num_streams: int) -> int:
    """Images of a run for --batch-size; several runs at a time take few, so that they end at the same time."""
    return min(batch_size, _IMAGES_OF_STREAM) if num_streams else batch_size


def run_sizes(num_images: int, size: int, num_streams: int, is_fixed: bool = False) -> list[int]:
    """Images of each run: `size`, with several at a time less and less at the end, so that all of them end together.

    Args:
      is_fixed: the model takes batches of `size` only.
    """
    sizes, remaining = list[int](), num_images
    while remaining:
        share = remaining if is_fixed or not num_streams else -(-remaining // (2 * num_streams))
        sizes.append(min(size, share, remaining))
        remaining -= sizes[-1]
    return sizes


def open_engine(
    path: str | pathlib.Path, provider: str = "cpu", device_id: int = 0, threads: int = 0, streams: int = 0
) -> Engine:
    """The engine for a model file, by its suffix: .onnx or .om."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: does not exist")
    if path.suffix == ".onnx":
        return OnnxEngine(path, provider, device_id, threads, streams)
    if path.suffix == ".om":
        return OmEngine(path, device_id)
    raise UserError(f"{path}: is neither .onnx nor .om")


def check_image_size(path: str, image_size: int | None, shape: Sequence[int | str | None]) -> None:
    """Raise UserError for another --image-size than that of a file with fixed sides.

    Args:
      shape: of one image in the model's input, CHW or HWC.
    """
    sides = [side for side in shape if isinstance(side, int) and side != 3]
    if image_size and {*sides} - {image_size}:
        raise UserError(
            f"--image-size: {image_size}, but {path} is fixed to images of {max(sides)} pixels; leave the option out, "
            "or export the checkpoint for this size"
        )


def takes_channels_last(shape: Sequence[int | str | None], dtype: np.dtype) -> bool:
    """Whether images are [H, W, 3], by the shape of one; where it is open, those of uint8 are, as with AIPP."""
    if 3 in (shape[0], shape[-1]):
        return shape[0] != 3
    return dtype == np.uint8


def check_classifier(
    path: str, image: Sequence[int | str | None], outputs: Sequence[int | str | None], dtype: np.dtype
) -> None:
    """Raise UserError for an input that is no batch of square RGB images, or an output that is no matrix.

    Args:
      image: shape of one image in the input.
      outputs: shape of the output.
    """
    is_valid = len(image) == 3
    if is_valid:
        is_last = takes_channels_last(image, dtype)
        channels, sides = (image[2], image[:2]) if is_last else (image[0], image[1:])
        is_valid = channels == 3 or not isinstance(channels, int)
        is_valid = is_valid and len({side for side in sides if isinstance(side, int)}) < 2
    if not is_valid:
        shape = " x ".join(["N", *(str(side or "?") for side in image)])
        raise UserError(f"{path}: the input has shape {shape}; expected N x 3 x S x S or N x S x S x 3")
    if len(outputs) != 2 or not isinstance(outputs[1], int):
        shape = " x ".join(str(side or "?") for side in outputs)
        raise UserError(f"{path}: the output has shape {shape}; expected images x classes")


def cpu_session(proto: "onnx.ModelProto", threads: int = 0, fuses_nodes: bool = True) -> Any:
    """ONNX Runtime's session of a model in memory; without fusions the results of all nodes are those of the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if not fuses_nodes:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


class OnnxEngine:
    """ONNX Runtime.

    Args:
      source: .onnx file, or the content of one.
      provider: key of PROVIDERS.
      device_id: index of the provider's device.
      threads: CPU threads of all runs together; 0 is one per core.
      streams: runs at a time on the CPU, each on its share of the threads; 0: one.
    Raises:
      UserError: a file that ONNX Runtime does not load, or a provider that is missing (ONNX Runtime alone would fall
        back to the CPU).
    """

    def __init__(
        self,
        source: pathlib.Path | bytes,
        provider: str = "cpu",
        device_id: int = 0,
        threads: int = 0,
        streams: int = 0,
    ) -> None:
        import onnxruntime

        wanted, available = PROVIDERS[provider], onnxruntime.get_available_providers()
        if wanted not in available:
            raise UserError(
                f"--provider: {provider} is not in the installed ONNX Runtime, which has {', '.join(available)}; "
                "install its own build of onnxruntime"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = (threads or parallel.usable_cores()) // streams if streams else threads
        providers = [wanted] if provider == "cpu" else [(wanted, {"device_id": str(device_id)})]
        errors = onnxruntime.capi.onnxruntime_pybind11_state
        names = ("Fail", "InvalidProtobuf", "InvalidGraph", "NotImplemented", "InvalidArgument")
        path = "the converted checkpoint" if isinstance(source, bytes) else str(source)
        content = source if isinstance(source, bytes) else path
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=providers)
        except tuple(getattr(errors, name) for name in names) as error:
            raise UserError(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0][:200]})") from error
        started = self._session.get_providers()[0]
        if started != wanted:
            raise UserError(
                f"--provider: {provider} did not start, ONNX Runtime fell back to {started}; its libraries are "
                "missing (cann: source set_env.sh)"
            )
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type not in INPUT_TYPES:
            found = ", ".join(f"{each.name} {each.type}" for each in inputs)
            raise UserError(f"{path}: has the inputs {found}; expected one of float32, float16 or uint8")
        self._input_name, self.streams = inputs[0].name, streams
        batch, *self.sample_shape = inputs[0].shape
        self.batch: int | None = batch if isinstance(batch, int) else None
        self.dtype = np.dtype(INPUT_TYPES[inputs[0].type])
        outputs = self._session.get_outputs()[0].shape
        check_classifier(path, self.sample_shape, outputs, self.dtype)
        self.num_outputs: int = outputs[1]
        self.metadata = onnx_metadata.decode(self._session.get_modelmeta().custom_metadata_map)

    def run(self, images: np.ndarray) -> np.ndarray:
        return self._session.run(None, {self._input_name: np.asarray(images, self.dtype)})[0]


class OmEngine:
    """An OM file on an Ascend NPU, through ais_bench's InferSession.

    Raises:
      UserError: ais_bench or aclruntime is not installed or does not load, there is no such device, or the file is
        damaged, of dynamic batch size, or takes input of another type.
    """

    def __init__(self, path: pathlib.Path, device_id: int = 0) -> None:
        self._path, self.streams = path, 0
        self._session = om_session.open_session(path, device_id)
        found = om_session.describe(self._session)
        if "batch" not in found or "shape" not in found:
            shape = [int(side) for side in self._session.get_inputs()[0].shape]
            raise UserError(
                f"{path}: has the input shape {shape}; expected a fixed batch size (for others: "
                "tools/run_ais_bench.py --dym-batch)"
            )
        if found.get("dtype") not in INPUT_TYPES.values():
            raise UserError(
                f"{path}: takes {found['sample_bytes']} bytes for shape {found['shape']}; expected uint8, "
                "float16 or float32"
            )
        self.batch: int | None = int(found["batch"])
        self.sample_shape: Sequence[int | str | None] = found["shape"]
        self.dtype = np.dtype(found["dtype"])
        self.num_outputs: int = self._session.get_outputs()[0].shape[-1]
        self.metadata: OnnxMetadata = {}

    def run(self, images: np.ndarray) -> np.ndarray:
        # InferSession passes on the bare address: a strided view would give wrong logits without an error.
        batch = np.ascontiguousarray(images, self.dtype)
        try:
            return np.asarray(om_session.with_reason(lambda: self._session.infer([batch]))[0])
        except RunError as error:
            raise RunError(f"{self._path}: {error}") from error


class EngineClassifier:
    """An Engine as a function from uint8 pixels [N, H, W, 3] to float32 logits [N, K], for any N.

    Args:
      spec: normalization for an engine of floats.
      aipp: what to normalize with instead, where an OM file would use AIPP.
    """

    def __init__(self, engine: Engine, spec: ModelSpec, aipp: AippEmulator | None = None) -> None:
        self.engine = engine
        self._normalize_into: NormalizeInto = (
            aipp.normalize_into if aipp else functools.partial(normalize_into, mean=spec.mean, std=spec.std)
        )
        self._buffers = threading.local()  # reused: fresh pages cost as much as the arithmetic

    @property
    def streams(self) -> int:
        """See Engine."""
        return self.engine.streams

    def with_normalization(self, normalize_into: NormalizeInto) -> "EngineClassifier":
        """The same engine with another normalization, which one of uint8 ignores."""
        other = copy.copy(self)
        other._normalize_into = normalize_into
        return other

    def __call__(self, pixels_NHWC: Array) -> np.ndarray:
        pixels_NHWC = np.asarray(pixels_NHWC)
        step = self.engine.batch or len(pixels_NHWC)
        logits = [self._run(pixels_NHWC[i : i + step], step) for i in range(0, len(pixels_NHWC), step)]
        return np.concatenate(logits).astype(np.float32, copy=False)

    def _run(self, pixels_NHWC: np.ndarray, batch_size: int) -> np.ndarray:
        """Logits of at most `batch_size` images; the rest of the batch is filled with zeros."""
        count, is_uint8 = len(pixels_NHWC), self.engine.dtype == np.uint8
        size = pixels_NHWC.shape[1]
        shape = [size, size, 3] if is_uint8 else [3, size, size]
        batch: np.ndarray | None = getattr(self._buffers, "batch", None)
        if batch is None or len(batch) < batch_size or list(batch.shape[1:]) != shape:
            batch = self._buffers.batch = np.empty((batch_size, *shape), np.uint8 if is_uint8 else np.float32)
        batch = batch[:batch_size]
        batch[count:] = 0
        if is_uint8:
            batch[:count] = pixels_NHWC
        else:
            for planes, pixels in zip(batch, pixels_NHWC, strict=False):
                self._normalize_into(planes, pixels)
        if takes_channels_last(self.engine.sample_shape, self.engine.dtype) != is_uint8:
            batch = np.ascontiguousarray(np.moveaxis(batch, 3, 1) if is_uint8 else np.moveaxis(batch, 1, 3))
        return self.engine.run(batch)[:count]
