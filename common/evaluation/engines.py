"""Things that turn images into logits: ONNX Runtime here, OM files through ais_bench's Python session on an NPU.

Every engine has `sample_shape`, `dtype`, `batch` (None: any), `num_outputs`, `facts` and `run(array) -> logits`;
`Pixels` makes any of them take the uint8 batches that the evaluator hands out. Importing this module imports no engine.
"""

import importlib.util
import json
import pathlib

import numpy as np

from common.data.transforms import normalize_into
from common.errors import UserError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cann": "CANNExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
INSTALL_AIS_BENCH = (
    "install the aclruntime and ais_bench 0.0.2 wheels from "
    "https://aisbench.obs.myhuaweicloud.com/packet/ais_bench_infer/0.0.2/ and source CANN's set_env.sh; "
    "tools/run_onnx.py does the same on any machine"
)


def open_engine(path, provider="cpu", device=0, threads=0):
    """The engine for a model file, by its suffix: .onnx or .om."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"--model: {path} does not exist")
    if path.suffix == ".onnx":
        return OnnxEngine(path, provider, device, threads)
    if path.suffix == ".om":
        return OmEngine(path, device)
    raise UserError(f"--model: {path} is neither .onnx nor .om")


class OnnxEngine:
    """ONNX Runtime.

    Args:
      path: .onnx file with one input.
      provider: key of PROVIDERS.
      device: index of the provider's device.
      threads: cores one run may use; 0 is all.
    Raises:
      UserError: not a model ONNX Runtime loads, or the provider is not there (it would silently use the CPU).
    """

    def __init__(self, path, provider="cpu", device=0, threads=0):
        import onnxruntime

        wanted = PROVIDERS[provider]
        if wanted not in onnxruntime.get_available_providers():
            raise UserError(
                f"--provider: {provider} is not in the installed ONNX Runtime, which has "
                f"{', '.join(onnxruntime.get_available_providers())}; install its own build of onnxruntime"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        choice = [wanted] if provider == "cpu" else [(wanted, {"device_id": str(device)})]
        errors = onnxruntime.capi.onnxruntime_pybind11_state
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=choice)
        except (
            errors.Fail,
            errors.InvalidProtobuf,
            errors.InvalidGraph,
            errors.NotImplemented,
            errors.InvalidArgument,
        ) as error:
            raise UserError(f"--model: ONNX Runtime cannot load {path}: {str(error).splitlines()[0][:200]}") from error
        if self._session.get_providers()[0] != wanted:
            raise UserError(
                f"--provider: {provider} did not start, ONNX Runtime fell back to "
                f"{self._session.get_providers()[0]}; its libraries are missing (cann: source set_env.sh)"
            )
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise UserError(f"--model: {path} has {len(inputs)} inputs, expected one")
        self._name = inputs[0].name
        batch, *self.sample_shape = inputs[0].shape
        self.batch = batch if isinstance(batch, int) else None
        self.dtype = np.dtype(
            {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}[inputs[0].type]
        )
        self.num_outputs = self._session.get_outputs()[0].shape[-1]
        self.facts = _facts(self._session.get_modelmeta().custom_metadata_map)

    def run(self, images):
        """One array [N, *sample_shape] -> logits [N, K]."""
        return self._session.run(None, {self._name: np.asarray(images, self.dtype)})[0]


def _facts(metadata):
    """What export stored in the file, decoded; an empty dict for files of other origin."""
    facts = {key: metadata[key] for key in ("arch",) if key in metadata}
    facts |= {key: json.loads(metadata[key]) for key in ("image_size", "mean", "std", "classes") if key in metadata}
    return facts


class OmEngine:
    """An OM file on an Ascend NPU, through ais_bench's InferSession.

    Raises:
      UserError: ais_bench or aclruntime is not installed.
    """

    facts: dict = {}

    def __init__(self, path, device=0):
        require_ais_bench()
        from ais_bench.infer.interface import InferSession

        self._session = InferSession(device, str(path))
        first = self._session.get_inputs()[0]
        self.batch, *self.sample_shape = first.shape
        count = int(np.prod(first.shape))
        kinds = {1: "uint8", 2: "float16", 4: "float32"}
        if first.realsize % count or first.realsize // count not in kinds:
            raise UserError(
                f"--model: {path} takes {first.realsize} bytes for shape {list(first.shape)}; expected "
                "uint8, float16 or float32"
            )
        self.dtype = np.dtype(kinds[first.realsize // count])
        self.num_outputs = self._session.get_outputs()[0].shape[-1]

    def run(self, images):
        """One array [batch, *sample_shape] -> logits [batch, K]."""
        # the session passes the bare address on: a strided view would give wrong numbers without an error
        return np.asarray(self._session.infer([np.ascontiguousarray(images, self.dtype)])[0])


def require_ais_bench():
    """Make sure that the inference tool can be imported.

    Raises:
      UserError: not installed, the unrelated package of the same name, or without its runtime.
    """
    if importlib.util.find_spec("ais_bench") is None:
        raise UserError(f"ais_bench: not installed; {INSTALL_AIS_BENCH}")
    try:
        found = importlib.util.find_spec("ais_bench.infer")
    except ModuleNotFoundError as error:
        raise UserError(f"ais_bench: installed, but {error.name} is missing; {INSTALL_AIS_BENCH}") from error
    if found is None:
        raise UserError(
            "ais_bench: the installed package of that name is another one (it evaluates language models); "
            f"remove it and {INSTALL_AIS_BENCH}"
        )


class Pixels:
    """Makes an engine a function from uint8 [N, H, W, 3] to float32 logits [N, K], for any N.

    Args:
      engine: OnnxEngine or OmEngine; one that takes uint8 normalizes by itself (AIPP).
      spec: ModelSpec with the normalization of the others.
      aipp: (table, swap) of aipp.lookup_table to compute AIPP's float16 arithmetic for an engine of floats.
    """

    def __init__(self, engine, spec, aipp=None):
        self.engine, self.spec, self.aipp = engine, spec, aipp
        self._buffer = np.empty(0)

    def __call__(self, pixels_NHWC):
        pixels_NHWC = np.asarray(pixels_NHWC)
        step = self.engine.batch or len(pixels_NHWC)
        logits = [self._run(pixels_NHWC[i : i + step], step) for i in range(0, len(pixels_NHWC), step)]
        return np.concatenate(logits).astype(np.float32, copy=False)

    def _run(self, pixels_NHWC, step):
        if len(self._buffer) != step:
            shape = [side if isinstance(side, int) else pixels_NHWC.shape[1] for side in self.engine.sample_shape]
            self._buffer = np.empty((step, *shape), np.uint8 if self.engine.dtype == np.uint8 else np.float32)
        self._buffer[len(pixels_NHWC) :] = 0
        if self.engine.dtype == np.uint8:
            self._buffer[: len(pixels_NHWC)] = pixels_NHWC
        else:
            for planes, pixels in zip(self._buffer, pixels_NHWC, strict=False):
                if self.aipp:
                    apply_aipp(planes, pixels, *self.aipp)
                else:
                    normalize_into(planes, pixels, self.spec.mean, self.spec.std)
        return self.engine.run(self._buffer)[: len(pixels_NHWC)]


def apply_aipp(planes_CHW, pixels_HWC, table, swap):
    """Fill float planes with what AIPP computes on the device from uint8 pixels (see aipp.lookup_table)."""
    for channel in range(3):
        planes_CHW[channel] = table[channel][pixels_HWC[:, :, 2 - channel if swap else channel]]
