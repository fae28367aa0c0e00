"""OpenVINO on the CPU as an Engine; a checkpoint is converted once, and kept in the cache for later starts.

Legend: N batch, K column of the logits.
"""

import functools
import hashlib
import importlib.util
import json
import pathlib
import sys
import tempfile
import threading
import typing
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common import parallel
from common.data import cache
from common.errors import UserError
from common.evaluation.onnx_metadata import OnnxMetadata
from common.spec import ModelSpec

if typing.TYPE_CHECKING:
    import torch

_KIND, _KEPT = ".openvino", 4  # suffix of the cached files, and how many stay: each is as large as its checkpoint


class Converted(typing.NamedTuple):
    """A network in OpenVINO's format.

    Attributes:
      xml, weights: content of the two files of that format.
      facts: what an evaluation prints and needs of the checkpoint; JSON can express it.
    """

    xml: str
    weights: np.ndarray
    facts: Mapping[str, Any]


def is_installed() -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec("openvino") is not None


def check_installed() -> None:
    """Raise UserError where the package is not there."""
    if not is_installed():
        raise UserError("--engine: openvino is not installed; pip install openvino")


@functools.cache
def core() -> Any:
    """OpenVINO's Core, one for the life of the process.

    Its CPU plugin gives the thread that loads it a stack for signal handlers, which it unmaps at its own end. Where
    another thread ends it, as the last one that holds a request, the next signal that Python handles (SIGCHLD, when a
    program that was started ends) kills the process. With this reference it does not end.
    """
    import openvino

    return openvino.Core()


def key(content: str, spec: ModelSpec, options: Sequence[object], versions: Mapping[str, str]) -> str:
    """Key of a converted checkpoint in the cache; it changes with the code that builds and loads the network.

    Args:
      content: hash of the file.
      options: those that change its network.
    """
    package = pathlib.Path(sys.modules[spec.builder.__module__].__file__ or "").parent
    common = pathlib.Path(__file__).resolve().parents[1]
    sources = sorted([*package.glob("*.py"), *(common / "weights").glob("*.py"), common / "layers.py"])
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return f"openvino {json.dumps([content, spec.name, list(map(str, options)), versions, code])}"


def load(cache_key: str) -> Converted | None:
    """The converted checkpoint of a key; None where there is none, or a damaged one."""
    stored = cache.read(cache_key, _KIND, private=True)  # OpenVINO takes memory that can be written only
    if stored is None:
        return None
    header, arrays = stored
    if zlib.crc32(arrays["weights"].data, zlib.crc32(header["xml"].encode())) != header["crc32"]:
        return None
    return Converted(header["xml"], arrays["weights"], header["facts"])


def convert(network: "torch.nn.Module", size: int, cache_key: str, facts: Mapping[str, Any]) -> Converted:
    """Convert a network for images of `size` pixels, and keep it under a key."""
    import openvino
    import torch

    with torch.inference_mode():
        model = openvino.convert_model(network.eval(), example_input=torch.zeros(1, 3, size, size))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
        xml = (folder / "model.xml").read_text()
        weights = np.fromfile(folder / "model.bin", np.uint8)
    crc32 = zlib.crc32(weights.data, zlib.crc32(xml.encode()))
    cache.write(cache_key, dict(xml=xml, facts=facts, crc32=crc32), dict(weights=weights), _KIND)
    cache.keep_newest(_KIND, _KEPT)
    return Converted(xml, weights, facts)


class OpenVinoEngine:
    """OpenVINO on the CPU, as an Engine.

    Args:
      source: .onnx file, or a converted network.
      size: side of the input, pixels; used for a converted network.
      threads: of all runs together; 0: one per core.
      streams: runs at a time, each on its share of the threads; 0: one.
    Raises:
      UserError: OpenVINO is not installed, or cannot load the file.
    """

    def __init__(
        self, source: pathlib.Path | Converted, size: int, is_float32: bool, threads: int, streams: int = 0
    ) -> None:
        check_installed()
        import openvino

        self.metadata: OnnxMetadata = {}
        self.is_float32, self.streams = is_float32, streams
        settings = {
            "INFERENCE_PRECISION_HINT": "f32" if is_float32 else "bf16",
            "PERFORMANCE_HINT": "THROUGHPUT" if streams else "LATENCY",
            "NUM_STREAMS": str(max(1, streams)),
            "INFERENCE_NUM_THREADS": str(threads or parallel.usable_cores()),
        }
        is_file = isinstance(source, pathlib.Path)
        try:
            if isinstance(source, pathlib.Path):
                model = core().read_model(source)
            else:
                model = core().read_model(source.xml, openvino.Tensor(source.weights, shared_memory=True))
            self._model = core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            name = source if is_file else "the converted checkpoint"
            raise UserError(f"--engine: openvino cannot load {name}: {str(error).strip().splitlines()[-1]}") from error
        self._source = source  # OpenVINO reads weights from its memory
        self._requests = threading.local()
        shape = self._model.input(0).get_partial_shape()
        sides = [side.get_length() if side.is_static else None for side in shape]
        self.batch: int | None = sides[0]
        self.sample_shape: Sequence[int | str | None] = sides[1:] if is_file else (3, size, size)
        self.dtype = np.dtype(self._model.input(0).get_element_type().to_dtype())
        self.num_outputs: int = self._model.output(0).get_partial_shape()[-1].get_length()

    def run(self, images: np.ndarray) -> np.ndarray:
        request = getattr(self._requests, "request", None)
        if request is None:
            request = self._requests.request = self._model.create_infer_request()
        request.infer({0: np.asarray(images, self.dtype)}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data)
