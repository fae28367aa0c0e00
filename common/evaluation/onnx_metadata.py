"""Metadata of an exported ONNX file: what evaluation and conversion need to know without the checkpoint."""

import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any


class OnnxMetadata(typing.TypedDict, total=False):
    """mean and std normalize RGB values in [0, 1]; image_size is the side of the input in pixels.

    precision: what the float network computes in.
    quantization: how common.deploy.quantize made an int8 file, and what it lost.
    """

    arch: str
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str]
    precision: str
    quantization: Mapping[str, Any]


def network(metadata: OnnxMetadata) -> str:
    """Name of the network of a file that this repository exported; empty for others, which may use `arch` too."""
    return metadata.get("arch", "") if "mean" in metadata else ""


def encode(metadata: OnnxMetadata) -> dict[str, str]:
    """ONNX metadata holds strings only: JSON, except for `arch`."""
    return {key: str(value) if key == "arch" else json.dumps(value) for key, value in metadata.items()}


def decode(entries: Mapping[str, str]) -> OnnxMetadata:
    """Inverse of `encode`; empty for a file that another program exported."""
    found = {key: entries[key] for key in OnnxMetadata.__annotations__ if key in entries}
    return typing.cast(
        OnnxMetadata, {key: value if key == "arch" else json.loads(value) for key, value in found.items()}
    )
