"""Small JPEG pictures as data: URIs, and heat maps drawn over images."""

import base64
import io

import numpy as np
from PIL import Image

from common.data import decode
from common.files import StrPath

SIDE = 176  # longer side, pixels
_HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32)  # inferno


def of_file(path: StrPath) -> str | None:
    """The image of a file, or None where it cannot be read."""
    try:
        image = decode.open_rgb(path)
    except decode.BadImage:
        return None
    return of_image(image)


def of_image(image: Image.Image) -> str:
    """The image as a data: URI."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def with_heat(pixels_HWC: np.ndarray, heat_hw: np.ndarray) -> Image.Image:
    """uint8 pixels in gray, colored by a heat map of values in [0, 1] of any resolution."""
    height, width = pixels_HWC.shape[:2]
    heat = Image.fromarray(heat_hw.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    heat_HW = np.clip(np.asarray(heat), 0, 1)
    position = heat_HW * (len(_HEAT) - 1)
    low = np.minimum(position.astype(int), len(_HEAT) - 2)
    part = (position - low)[..., None]
    color = _HEAT[low] * (1 - part) + _HEAT[low + 1] * part
    gray = np.asarray(Image.fromarray(pixels_HWC).convert("L"), np.float32)[..., None]
    share = 0.25 + 0.5 * heat_HW[..., None]
    return Image.fromarray(np.uint8(gray * (1 - share) + color * share))
