"""Decoding as the published accuracies did it: PIL, converted to RGB, EXIF orientation ignored."""

import io
import os
import stat
import warnings
from collections.abc import Mapping
from typing import Any, BinaryIO

from PIL import ExifTags, Image, ImageChops, ImageFile

from common.errors import UserError
from common.files import StrPath

# The extensions of torchvision's ImageFolder, and other names of JPEG files; other files are ignored and counted.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".jfif", ".jpe")

# Images in formats that not every build of PIL reads, or that may hold several images.
UNREAD_EXTENSIONS = (".avif", ".heic", ".heif", ".gif", ".jp2", ".jxl", ".tga", ".psd", ".dng", ".exr", ".dcm")

# Only these contents are decoded, whatever the extension: PIL would start Ghostscript for EPS.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

# PIL's own threshold of a decompression bomb, 1 GiB / 4 / 3, about 9459 x 9459: far above the images of ImageNet. A
# decoded pixel takes 4 bytes, and 4 more while its mode is converted, so no file costs a process more than 716 MB.
MAX_PIXELS = 89_478_485
MAX_BYTES = 1 << 26  # of a file that is read at once; photographs have fewer


class BadImage(UserError):
    """An image file does not decode.

    Attributes:
      path: the file.
      reason: why.
    """

    def __init__(self, path: StrPath, reason: str) -> None:
        super().__init__(f"{path}: does not decode as an image ({reason}); replace or remove it", every_rank=False)
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, str]]:  # dataloader workers pickle it
        return type(self), (self.path, self.reason)


class GiantImage(BadImage):
    """An image of more than MAX_PIXELS, which was not decoded."""


def open_file(path: StrPath) -> BinaryIO:
    """Open an image file to read; a pipe or device of its name is an error, not a wait for data.

    Raises:
      BadImage: it is not a regular file.
      OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise BadImage(path, "not a regular file")


def read_file(path: StrPath) -> bytes | None:
    """Content of a file of at most MAX_BYTES; None for larger ones, of which a decoder reads a part at a time.

    Raises:
      BadImage: it cannot be read.
    """
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                return None
            return file.read()
    except OSError as error:
        raise _bad_image(path, error) from error


def _opened(path: StrPath, content: bytes | None) -> BinaryIO:
    """A file to decode; arguments: see open_rgb."""
    return open_file(path) if content is None else io.BytesIO(content)


def open_rgb(path: StrPath, content: bytes | None = None) -> Image.Image:
    """Decode one file to a fully loaded RGB image.

    Grayscale, palette, CMYK and RGBA files are converted by PIL, of 16-bit files the high byte is taken. The content
    decides the format, not the extension.

    Args:
      content: of the file, where it was read already; `path` is then only its name.
    Raises:
      BadImage: unreadable, truncated, not an image, or of values whose range is not known.
      GiantImage: the header states more than MAX_PIXELS; nothing was decoded.
    """
    try:
        with warnings.catch_warnings():
            # Harmless warnings about metadata in ImageNet's own files (broken EXIF, palette with bytes transparency).
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS replaces it
            with _opened(path, content) as file, Image.open(file, formats=_FORMATS) as image:  # reads the header only
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                if reason := _misread(image):
                    raise BadImage(path, f"{reason}; save it with 8 bits per channel")
                image.load()
                if image.mode == "RGB":
                    return image
                return (_high_byte(image) if image.mode.startswith("I") else image).convert("RGB")
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise GiantImage(path, f"{error}; at most {MAX_PIXELS:,} are decoded") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(path, _unidentified(path, content)) from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        # SyntaxError for broken PNG chunks, TypeError for TIFF tags of a wrong type, OSError and ValueError for the
        # rest (140,000 files with random damage raised nothing else).
        raise _bad_image(path, error) from error


def is_turned(path: StrPath, content: bytes | None = None) -> bool:
    """Whether EXIF says to turn or mirror what open_rgb gives; False for what is no image.

    Reads the header only. PIL itself turns TIFF files. Arguments: see open_rgb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(path, content) as file, Image.open(file, formats=_FORMATS) as image:
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                return orientation in range(2, 9) and image.format != "TIFF"
    except (BadImage, OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return False


def _bad_image(path: StrPath, error: Exception) -> BadImage:
    text = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    return BadImage(path, text.replace(str(path), "the file"))


_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF


def _tiff_tags(image: ImageFile.ImageFile) -> Mapping[int, Any]:
    return getattr(image, "tag_v2", {})


def _misread(image: ImageFile.ImageFile) -> str:
    """What PIL would clip or read as other numbers than the file holds, or an empty text.

    PIL converts modes I and F by clipping to 0..255, reads signed bytes as unsigned, and reads uncompressed 16-bit
    color in separate planes as if it had 8 bits.
    """
    if image.mode == "F":
        return "mode F, floats of unknown range"
    if image.format != "TIFF":
        return ""  # where PNG and PGM are mode I, the range is 0..65535
    tags = _tiff_tags(image)
    if 2 in tags.get(_SAMPLE_FORMAT, ()):
        return f"mode {image.mode}, signed integers of unknown range"
    if image.mode == "I":
        return "mode I, 32-bit integers of unknown range"
    deep = max(tags.get(_BITS_PER_SAMPLE, (1,))) > 8
    if deep and tags.get(_PLANAR) == 2 and any(tile[0] == "raw" for tile in image.tile):
        return f"mode {image.mode}, uncompressed 16-bit planes"
    return ""


def _high_byte(image: ImageFile.ImageFile) -> Image.Image:
    """Mode L of a 16-bit grayscale image: the high byte of each value, which PIL takes of 16-bit colors too."""
    tags = _tiff_tags(image)
    big_endian = image.tobytes("raw", "I;16B")
    gray = Image.frombytes("L", image.size, big_endian[::2])
    if tags.get(_BITS_PER_SAMPLE) == (12,):  # 0..4095: the four low bits of the high byte, four of the low byte
        low = Image.frombytes("L", image.size, big_endian[1::2])
        gray = ImageChops.add(gray.point([i << 4 & 255 for i in range(256)]), low.point([i >> 4 for i in range(256)]))
    return ImageChops.invert(gray) if tags.get(_PHOTOMETRIC) == 0 else gray  # white is 0; PIL inverts 8 bits only


_HEIF = "HEIF or AVIF, which is not read; convert it to JPEG or PNG"
_TIFF = "a TIFF of a pixel format that is not read; save it with 8 bits per channel"
# What files with the extension of an image hold besides images that PIL reads: (bytes, their offset, name).
_CONTENTS = (
    *((brand, 4, _HEIF) for brand in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif", b"ftypavis")),
    *((magic, 0, _TIFF) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"version https://git-lfs", 0, "a Git LFS pointer; run git lfs pull"),
)


def _unidentified(path: StrPath, content: bytes | None) -> str:
    """What a file holds that PIL cannot identify."""
    if content is None:
        with open_file(path) as file:
            content = file.read(32)
    begin = content[:32]
    found = [name for magic, offset, name in _CONTENTS if begin.startswith(magic, offset)]
    return f"it holds {found[0]}" if found else "cannot identify image file"
