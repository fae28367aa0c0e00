"""From a PIL image to the uint8 pixels the network sees; normalization happens later, on the device.

Module and evaluation transform need only PIL: preprocessing starts without torch, and without numpy for uint8 files,
because these imports take longer than many images. Legend: H W pixel, C channel.
"""

import functools
import math
import struct
import typing
from collections.abc import Callable, Sequence

from PIL import Image, ImageOps

from common.spec import ModelSpec

if typing.TYPE_CHECKING:
    import numpy as np


# Fills float32 planes [3, H, W] from uint8 pixels [H, W, 3].
NormalizeInto = Callable[["np.ndarray", "np.ndarray"], None]


# Half the width of PIL's filters, in source pixels where the image does not get smaller.
_REACH = {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2, Image.Resampling.LANCZOS: 3}
# Of these versions it is known which pass comes first: rows; in 13 columns, where the image is tall.
_KNOWS_PASSES = 10 <= int(Image.__version__.partition(".")[0]) <= 13
_TALL = 1.8  # height / width; the columns come first from 2 on


def center_crop_offset(size: int, crop: int, rounding: str) -> int:
    """First pixel of a center crop. (342 - 299) / 2 is 22 with "round" (half to even, torchvision), 21 with "floor"."""
    border = (size - crop) / 2
    return round(border) if rounding == "round" else int(border)


def resize_short_side(
    image: Image.Image, short: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Resize: the short side to `short` pixels, the long side in proportion, rounded down."""
    return image if min(image.size) == short else image.resize(_resized_size(image.size, short), resample)


def _resized_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def eval_crop(
    image: Image.Image,
    resize: int,
    crop: int,
    rounding: str,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    """The published evaluation transform up to the pixels: `resize_short_side`, then `center_crop`.

    PIL resizes in two passes with 8-bit pixels between them, rows first. Here each pass is a call of its own: the first
    one leaves out the rows that the crop does not need, the second one the columns. The pixels are the same.

    Args:
      image: RGB.
      resize: short side after the resize, pixels, at least `crop`.
      crop: side of the square that is cut out of the center, pixels.
      rounding: see center_crop_offset.
      resample: PIL's filter; the published one is bilinear.
    """
    width, height = image.size
    is_known = _KNOWS_PASSES and image.mode == "RGB" and resample in _REACH and height <= _TALL * width
    if not is_known or min(width, height) == resize:
        return center_crop(resize_short_side(image, resize, resample), crop, rounding)
    new_width, new_height = _resized_size(image.size, resize)
    left, top = (center_crop_offset(side, crop, rounding) for side in (new_width, new_height))
    scale = height / new_height
    reach = _REACH[resample] * max(scale, 1) + 1  # source rows to each side of a row's center; one more for rounding
    first = max(0, math.floor((top + 0.5) * scale - reach))
    end = min(height, math.ceil((top + crop - 0.5) * scale + reach))
    rows = image.crop((0, first, width, end)).resize((new_width, end - first), resample)
    # crop() fills the rows that were left out with black, so that the second pass has the filters of all rows.
    columns = rows.crop((left, -first, left + crop, height - first)).resize((crop, new_height), resample)
    return columns.crop((0, top, crop, top + crop))


def center_crop(image: Image.Image, crop: int, rounding: str) -> Image.Image:
    """The square of `crop` pixels in the center; see center_crop_offset for `rounding`."""
    left = center_crop_offset(image.width, crop, rounding)
    top = center_crop_offset(image.height, crop, rounding)
    return image.crop((left, top, left + crop, top + crop))


def eval_crop_transform(
    spec: ModelSpec, image_size: int | None = None, upright: bool = False
) -> Callable[[Image.Image], Image.Image]:
    """`eval_crop` of a network; at an `image_size` (pixels) other than the published one, the resize scales with it.

    Args:
      upright: first turn the image as EXIF says, which no published accuracy did.
    """
    size = image_size or spec.input_size
    crop = functools.partial(eval_crop, resize=spec.resize_for(size), crop=size, rounding=spec.crop_rounding)
    return (lambda image: crop(ImageOps.exif_transpose(image))) if upright else crop


def eval_transform(
    spec: ModelSpec, image_size: int | None = None, upright: bool = False
) -> "Callable[[Image.Image], np.ndarray]":
    """`eval_crop_transform` to a C-contiguous uint8 array [image_size, image_size, 3]."""
    import numpy as np

    crop = eval_crop_transform(spec, image_size, upright)
    return lambda image: np.asarray(crop(image))


def normalize_into(
    planes_CHW: "np.ndarray", pixels_HWC: "np.ndarray", mean: Sequence[float], std: Sequence[float]
) -> None:
    """(x / 255 - mean) / std in float32, operation by operation as torchvision's ToTensor and Normalize.

    Args:
      planes_CHW: float32, overwritten; reuse it, because page faults of a new array cost as much as the arithmetic.
      pixels_HWC: uint8.
      mean, std: per channel, of values in [0, 1].
    """
    import numpy as np

    for channel, (center, scale) in enumerate(zip(mean, std, strict=True)):
        plane = planes_CHW[channel]
        plane[...] = pixels_HWC[:, :, channel]
        plane /= np.float32(255)
        plane -= np.float32(center)
        plane /= np.float32(scale)


def normalized_levels(mean: float, std: float) -> list[float]:
    """What `normalize_into` makes of the levels 0 to 255 of a channel, without numpy.

    Every operation in double precision is rounded to float32: for these operations, the result in float32.
    """
    center, scale = _float32(mean), _float32(std)
    return [_float32(_float32(_float32(level / 255) - center) / scale) for level in range(256)]


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]
