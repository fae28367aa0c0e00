"""Reading image files as the published accuracies did: PIL, converted to RGB, EXIF orientation ignored."""

import warnings

from PIL import Image

from common.errors import UserError

# The extensions of torchvision's ImageFolder; other files are ignored and counted.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class BadImage(UserError):
    """A file that should be an image and does not decode; `path` names it and `reason` says why."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: does not decode as an image ({reason}); replace or remove it", every_rank=False)
        self.path, self.reason = str(path), reason

    def __reduce__(self):  # so that it survives the way out of a loader process
        return type(self), (self.path, self.reason)


def open_rgb(path):
    """Decode one file.

    Grayscale, palette, CMYK and RGBA files are converted by PIL, as the references do; the extension is not believed.

    Returns:
      PIL image, mode RGB, fully loaded.
    Raises:
      BadImage: unreadable, truncated, not an image, or larger than PIL's pixel limit.
    """
    try:
        with warnings.catch_warnings():
            # Known-harmless metadata warnings of ImageNet's own files (broken EXIF, palette with bytes transparency).
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # PIL raises SyntaxError for broken PNG chunks, ValueError and OSError for the rest.
        raise BadImage(path, f"{type(error).__name__}: {error}".replace(str(path), "the file")) from error
