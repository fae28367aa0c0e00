"""OpenVINO on the CPU as an Engine."""

import functools
import importlib.util
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import parallel
from common.errors import UserError
from common.evaluation.onnx_metadata import OnnxMetadata


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


class OpenVinoEngine:
    """OpenVINO on the CPU, as an Engine.

    Args:
      source: .onnx file, or the content of one.
      threads: of all runs together; 0: one per core.
      streams: runs at a time, each on its share of the threads; 0: one.
    Raises:
      UserError: OpenVINO cannot load the file.
    """

    def __init__(self, source: pathlib.Path | bytes, is_float32: bool, threads: int, streams: int = 0) -> None:
        self.metadata: OnnxMetadata = {}
        self.is_float32, self.streams = is_float32, streams
        settings = {
            "INFERENCE_PRECISION_HINT": "f32" if is_float32 else "bf16",
            "PERFORMANCE_HINT": "THROUGHPUT" if streams else "LATENCY",
            "NUM_STREAMS": str(max(1, streams)),
            "INFERENCE_NUM_THREADS": str(threads or parallel.usable_cores()),
        }
        try:
            self._model = core().compile_model(core().read_model(source), "CPU", settings)
        except RuntimeError as error:
            name = source if isinstance(source, pathlib.Path) else "the converted checkpoint"
            raise UserError(f"--engine: openvino cannot load {name}: {str(error).strip().splitlines()[-1]}") from error
        self._requests = threading.local()
        shape = self._model.input(0).get_partial_shape()
        sides = [side.get_length() if side.is_static else None for side in shape]
        self.batch: int | None = sides[0]
        self.sample_shape: Sequence[int | str | None] = sides[1:]
        self.dtype = np.dtype(self._model.input(0).get_element_type().to_dtype())
        self.num_outputs: int = self._model.output(0).get_partial_shape()[-1].get_length()

    def run(self, images: np.ndarray) -> np.ndarray:
        request = getattr(self._requests, "request", None)
        if request is None:
            request = self._requests.request = self._model.create_infer_request()
        request.infer({0: np.asarray(images, self.dtype)}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data)
