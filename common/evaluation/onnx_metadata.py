"""Metadata of an exported ONNX file: what evaluation and conversion need to know without the checkpoint."""

import json
import typing
from collections.abc import Callable, Mapping, Sequence
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


def _is_list_of(value: Any, kind: type, length: int | None = None) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value) and length in (None, len(value))


_VALID: Mapping[str, Callable[[Any], bool]] = {
    "arch": lambda value: True,
    "image_size": lambda value: type(value) is int and value > 0,
    "mean": lambda value: _is_list_of(value, float, 3),
    "std": lambda value: _is_list_of(value, float, 3),
    "classes": lambda value: _is_list_of(value, str),
    "precision": lambda value: isinstance(value, str),
    "quantization": lambda value: isinstance(value, dict),
}


def network(metadata: OnnxMetadata) -> str:
    """Name of the network of a file that this repository exported; empty for others, which may use `arch` too."""
    return metadata.get("arch", "") if "mean" in metadata else ""


def encode(metadata: OnnxMetadata) -> dict[str, str]:
    """ONNX metadata holds strings only: JSON, except for `arch`."""
    return {key: str(value) if key == "arch" else json.dumps(value) for key, value in metadata.items()}


def decode(entries: Mapping[str, str]) -> OnnxMetadata:
    """Inverse of `encode`; what other programs store under these names is left out, where its form is another one."""
    found = {}
    for key, is_valid in _VALID.items():
        if key in entries:
            try:
                value = entries[key] if key == "arch" else json.loads(entries[key])
            except ValueError:
                continue
            if is_valid(value):
                found[key] = value
    return typing.cast(OnnxMetadata, found)
