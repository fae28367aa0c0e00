"""Reading image files as the published accuracies did: PIL, converted to RGB, EXIF orientation ignored."""

import warnings

from PIL import Image

from common.errors import UserError

# The extensions of torchvision's ImageFolder; other files are ignored and counted.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Whatever the extension says, these contents are decoded and no others: PIL would start Ghostscript for EPS.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

# PIL's own threshold for suspicious images, 1 GiB / 4 / 3, about 9459 x 9459: far above any photograph of ImageNet. A
# decoded pixel takes 4 bytes, and 4 more while its mode is converted, so no file costs a process more than 716 MB.
MAX_PIXELS = 89_478_485


class BadImage(UserError):
    """A file that should be an image and does not decode; `path` names it and `reason` says why."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: does not decode as an image ({reason}); replace or remove it", every_rank=False)
        self.path, self.reason = str(path), reason

    def __reduce__(self):  # so that it survives the way out of a loader process
        return type(self), (self.path, self.reason)


class GiantImage(BadImage):
    """An image of more than MAX_PIXELS, which was not decoded."""


def open_rgb(path):
    """Decode one file.

    Grayscale, palette, CMYK and RGBA files are converted by PIL, as the references do; the extension is not believed.

    Returns:
      PIL image, mode RGB, fully loaded.
    Raises:
      BadImage: unreadable, truncated or not an image.
      GiantImage: the file says that it has more than MAX_PIXELS; nothing was decoded.
    """
    try:
        with warnings.catch_warnings():
            # Known-harmless metadata warnings of ImageNet's own files (broken EXIF, palette with bytes transparency).
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit below is ours
            with Image.open(path, formats=_FORMATS) as image:  # reads the header only
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                image.load()
                return image if image.mode == "RGB" else image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise GiantImage(path, f"{error}; at most {MAX_PIXELS:,} are decoded") from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:
        # PIL raises SyntaxError for broken PNG chunks, TypeError for TIFF tags of a wrong type, ValueError and OSError
        # for the rest (140,000 files with random damage raised nothing else).
        raise BadImage(path, f"{type(error).__name__}: {error}".replace(str(path), "the file")) from error
