"""JPEG files decoded by simplejpeg where it is installed, else by torchvision: faster than PIL, and the same pixels.

All three call libjpeg-turbo. simplejpeg also stops at the last row of a crop; torchvision would print a warning about
the rest of each file to stderr.
"""

import functools
import importlib.util
import io
import pathlib
import types
import typing
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from common.data.decode import MAX_PIXELS

# 4:2:0, 77 x 58 pixels: decoders must agree on the interpolation of color, the last rows and the last columns.
_CHECK_FILE = pathlib.Path(__file__).with_name("decoder_check.jpg")
_BASELINE = (0xC0, 0xC1)  # sequential, Huffman: rows follow each other in the file
_PROGRESSIVE = 0xC2
_SKIPPED = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, comments and application data before the header
_RGB = 3  # torchvision.io.ImageReadMode
_END = b"\xff\xd9"
# Rows below a crop that are decoded too: color planes of half the height are interpolated between rows.
_MARGIN = 4


class Header(typing.NamedTuple):
    """Size of a JPEG file, and where its height is stored.

    Attributes:
      height_at: offset of the 16-bit height.
      is_baseline: whether a part of the file gives the first rows.
    """

    width: int
    height: int
    height_at: int
    is_baseline: bool


@functools.cache
def _simplejpeg() -> types.ModuleType | None:
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


@functools.cache
def _torchvision_decode() -> Callable[[torch.Tensor, int, bool], torch.Tensor]:
    """torchvision's operator (content, mode, whether to apply EXIF's orientation); `import torchvision` takes a second.

    Raises:
      AttributeError: torchvision was built without libjpeg.
    """
    package = importlib.util.find_spec("torchvision")
    library = pathlib.Path(package.origin).with_name("image.so") if package and package.origin else pathlib.Path()
    if library.is_file():
        torch.ops.load_library(library)
    else:  # other names on other systems
        importlib.import_module("torchvision.io")
    return torch.ops.image.decode_jpeg


def header(content: bytes) -> Header | None:
    """Header of a grayscale or color JPEG of 8 bits; None for all other files, which PIL decodes."""
    if content[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker in (*_BASELINE, _PROGRESSIVE):
            bits, components = content[at + 4], content[at + 9]
            height, width = (int.from_bytes(content[at + i : at + i + 2], "big") for i in (5, 7))
            if bits != 8 or components not in (1, 3) or not 0 < width * height <= MAX_PIXELS:
                return None
            return Header(width, height, at + 5, marker in _BASELINE)
        if marker not in _SKIPPED:
            return None
        at += 2 + length
    return None


def decode(content: bytes, head: Header, bottom: int) -> torch.Tensor:
    """Pixels uint8 [3, rows, width], in memory [rows, width, 3]; the first `bottom` rows are right, there may be more.

    Of a complete baseline file simplejpeg does not decode the rest: the header is made to state fewer rows.

    Raises:
      RuntimeError, ValueError: the decoder cannot read the file.
    """
    if (simplejpeg := _simplejpeg()) is None:
        return _torchvision_decode()(torch.frombuffer(bytearray(content), dtype=torch.uint8), _RGB, False)
    data, rows = content, bottom + _MARGIN
    if is_part := head.is_baseline and rows < head.height and _has_end(content, head):
        at = head.height_at
        data = b"".join((content[:at], rows.to_bytes(2, "big"), content[at + 2 :]))
    return torch.from_numpy(simplejpeg.decode_jpeg(data, strict=not is_part)).permute(2, 0, 1)


def _has_end(content: bytes, head: Header) -> bool:
    """Whether the end of the image is there. One before the frame's header is that of an embedded thumbnail."""
    return content.rfind(_END, max(head.height_at, len(content) - 1024)) >= 0


@functools.cache
def check_pixels() -> torch.Tensor | None:
    """Pixels [3, H, W] of a built-in file; None where the decoder is missing, or reads other pixels than PIL."""
    content = _CHECK_FILE.read_bytes()
    head = header(content)
    assert head is not None
    try:
        found = decode(content, head, head.height)
    except (RuntimeError, ValueError, AttributeError, ImportError, OSError):  # torchvision without libjpeg
        return None
    with Image.open(io.BytesIO(content)) as image:
        return found if np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(image)) else None
