"""Checkpoint -> ONNX: the trace behind every export, and copies in the cache that eval.py's engines compute with.

A checkpoint is converted once. Later starts read the copy, and import neither torch nor the checkpoint.
"""

import hashlib
import json
import pathlib
import sys
import tempfile
import typing
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.data import cache
from common.errors import UserError
from common.evaluation import engines
from common.spec import ModelSpec

if typing.TYPE_CHECKING:
    import torch

OPSET = 11  # unless --opset is given
# Share of the largest logit, which counts as at least 1: what a different order of float32 sums explains, and what
# float16 costs networks of a hundred layers.
TOLERANCES = {"float32": 1e-4, "float16": 0.05}
_KIND, _KEPT = ".converted", 4  # suffix of the cached files, and how many stay: each is as large as its checkpoint


class Converted(typing.NamedTuple):
    """A network as ONNX.

    Attributes:
      proto: content of an .onnx file.
      facts: what an evaluation prints and needs of the checkpoint; JSON can express it.
    """

    proto: bytes
    facts: Mapping[str, Any]

    def crc32(self) -> int:
        """Checksum of both."""
        return zlib.crc32(self.proto, zlib.crc32(json.dumps(self.facts).encode()))


def trace(
    model: "torch.nn.Module",
    spec: ModelSpec,
    path: pathlib.Path,
    image_size: int,
    batch: int | None = None,
    opset: int = OPSET,
    input_dtype: str = "float32",
) -> None:
    """Write a network in evaluation mode as an ONNX file with input [batch, 3, image_size, image_size].

    Args:
      batch: None for a dynamic batch axis.
      input_dtype: float32, or float16 for a network that computes in float32.
    """
    import torch

    class FromHalf(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images.float())

    device = next(model.parameters()).device
    images = torch.zeros(batch or 1, 3, image_size, image_size, device=device, dtype=getattr(torch, input_dtype))
    axes = None if batch else {spec.onnx_input: {0: "batch"}, spec.onnx_output: {0: "batch"}}
    with warnings.catch_warnings():
        # A shape that the network reads becomes a constant, as it should: only the batch axis is dynamic.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        # dynamo=True cannot write opset 11, and atc misreads its ReduceMean.
        torch.onnx.export(
            model if input_dtype == "float32" else FromHalf().eval(),
            (images,),
            str(path),
            input_names=[spec.onnx_input],
            output_names=[spec.onnx_output],
            opset_version=opset,
            dynamic_axes=axes,
            dynamo=False,
        )


def check_logits(
    model: "torch.nn.Module",
    path: pathlib.Path,
    batch: int,
    image_size: int,
    input_dtype: str,
    precision: str,
    refusal: str,
) -> float:
    """Largest difference of ONNX Runtime from torch on one random batch, as a share of the largest logit.

    Args:
      path: the network in ONNX.
      precision: what it computes in, of TOLERANCES.
      refusal: first words of the error.
    Raises:
      UserError: the difference is above TOLERANCES.
    """
    import torch

    # Upsampled noise, smooth like photographs: white noise drives a trained network far outside its range.
    noise = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    images = torch.nn.functional.interpolate(noise, size=(image_size, image_size), mode="bilinear")
    images = images.to(getattr(torch, input_dtype)).float()
    with torch.inference_mode():
        expected = model(images.to(next(model.parameters()).device)).float().cpu().numpy()
    actual = engines.OnnxEngine(path).run(images.numpy())
    difference, largest = float(np.abs(actual - expected).max()), float(np.abs(expected).max())
    tolerance = TOLERANCES[precision]
    if not difference <= tolerance * max(1.0, largest):  # also true for NaN
        raise UserError(
            f"{refusal}, ONNX Runtime differs from torch by {difference:.3g} where the largest logit is {largest:.3g} "
            f"(batch {batch}); allowed is {tolerance} of it"
        )
    return difference / (largest or 1.0)


def key(content: str, spec: ModelSpec, options: Sequence[object], versions: Mapping[str, str]) -> str:
    """Key of a converted checkpoint in the cache; it changes with the code that builds, loads and converts the network.

    Args:
      content: hash of the file.
      options: those that change its network.
    """
    package = pathlib.Path(sys.modules[spec.builder.__module__].__file__ or "").parent
    common = pathlib.Path(__file__).resolve().parents[1]
    shared = (*(common / "weights").glob("*.py"), common / "layers.py", pathlib.Path(__file__))
    sources = sorted([*package.glob("*.py"), *shared])
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return f"converted {json.dumps([content, spec.name, list(map(str, options)), versions, code])}"


def load(cache_key: str) -> Converted | None:
    """The converted checkpoint of a key; None where there is none, or a damaged one."""
    stored = cache.read(cache_key, _KIND)
    if stored is None:
        return None
    header, arrays = stored
    if not {"facts", "crc32"} <= header.keys() or "proto" not in arrays:
        return None
    found = Converted(arrays["proto"].tobytes(), header["facts"])
    return found if found.crc32() == header["crc32"] else None


def convert(
    network: "torch.nn.Module", spec: ModelSpec, size: int, cache_key: str, facts: Mapping[str, Any]
) -> Converted:
    """Convert a network for images of `size` pixels, and keep it under a key.

    Raises:
      UserError: ONNX Runtime computes other logits than torch.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "net.onnx")
        trace(network.eval(), spec, path, size)
        check_logits(network, path, 2, size, "float32", "float32", "--engine: give torch")  # it was traced with one
        proto = path.read_bytes()
    converted = Converted(proto, facts)
    header = dict(facts=facts, crc32=converted.crc32())
    cache.write(cache_key, header, dict(proto=np.frombuffer(proto, np.uint8)), _KIND)
    cache.keep_newest(_KIND, _KEPT)
    return converted
