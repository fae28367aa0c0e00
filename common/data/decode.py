"""Decoding as the published accuracies did it: PIL, converted to RGB, EXIF orientation ignored."""

import warnings

from PIL import Image

from common.errors import UserError
from common.files import StrPath

# The extensions of torchvision's ImageFolder; other files are ignored and counted.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Only these contents are decoded, whatever the extension: PIL would start Ghostscript for EPS.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

# PIL's own threshold of a decompression bomb, 1 GiB / 4 / 3, about 9459 x 9459: far above the images of ImageNet. A
# decoded pixel takes 4 bytes, and 4 more while its mode is converted, so no file costs a process more than 716 MB.
MAX_PIXELS = 89_478_485


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


def open_rgb(path: StrPath) -> Image.Image:
    """Decode one file to a fully loaded RGB image.

    Grayscale, palette, CMYK and RGBA files are converted by PIL. The content decides the format, not the extension.

    Raises:
      BadImage: unreadable, truncated or not an image.
      GiantImage: the header states more than MAX_PIXELS; nothing was decoded.
    """
    try:
        with warnings.catch_warnings():
            # Harmless warnings about metadata in ImageNet's own files (broken EXIF, palette with bytes transparency).
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS replaces it
            with Image.open(path, formats=_FORMATS) as image:  # reads the header only
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                image.load()
                return image if image.mode == "RGB" else image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise GiantImage(path, f"{error}; at most {MAX_PIXELS:,} are decoded") from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        # SyntaxError for broken PNG chunks, TypeError for TIFF tags of a wrong type, OSError and ValueError for the
        # rest (140,000 files with random damage raised nothing else).
        raise BadImage(path, f"{type(error).__name__}: {error}".replace(str(path), "the file")) from error
