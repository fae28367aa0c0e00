"""From a PIL image to the uint8 pixels the network sees; normalization happens later, on the device.

The evaluation part needs only PIL, and numpy where arrays are asked for: preprocessing starts without torch, and its
uint8 files without numpy, as imports take longer than many images. Legend: H W pixel, C channel.
"""

import functools

from PIL import Image


def center_crop_offset(size, crop, rounding):
    """First pixel of a center crop: "round" is half to even as in torchvision (342, 299 -> 22), "floor" cuts (21)."""
    border = (size - crop) / 2
    return round(border) if rounding == "round" else int(border)


def resize_short_side(image, short):
    """Resize a PIL image bilinearly: the short side to `short` pixels, the long one in proportion, rounded down."""
    width, height = image.size
    if min(width, height) == short:
        return image
    if width <= height:
        size = (short, int(short * height / width))
    else:
        size = (int(short * width / height), short)
    return image.resize(size, Image.Resampling.BILINEAR)


def eval_crop(image, resize, crop, rounding):
    """The published evaluation transform up to the pixels: resize the short side, cut the center.

    Args:
      image: PIL RGB image.
      resize: short side after the resize, pixels, at least `crop`.
      crop: side of the square that is cut out, pixels.
      rounding: see center_crop_offset.
    Returns:
      PIL RGB image of crop x crop pixels.
    """
    image = resize_short_side(image, resize)
    left = center_crop_offset(image.width, crop, rounding)
    top = center_crop_offset(image.height, crop, rounding)
    return image.crop((left, top, left + crop, top + crop))


def eval_pixels(image, **transform):
    """`eval_crop` as a uint8 array [crop, crop, 3], C-contiguous."""
    import numpy as np

    return np.asarray(eval_crop(image, **transform))


def normalize_into(planes_CHW, pixels_HWC, mean, std):
    """(x / 255 - mean) / std in float32, operation by operation as ToTensor and Normalize do it.

    Args:
      planes_CHW: float32 array to fill; reuse it, fresh pages cost as much as the arithmetic.
      pixels_HWC: uint8 array.
      mean, std: per channel, of values in [0, 1].
    """
    import numpy as np

    for channel, (center, scale) in enumerate(zip(mean, std, strict=True)):
        plane = planes_CHW[channel]
        plane[...] = pixels_HWC[:, :, channel]
        plane /= np.float32(255)
        plane -= np.float32(center)
        plane /= np.float32(scale)


def eval_transform(spec, image_size=None, to=eval_pixels):
    """The evaluation transform of a ModelSpec: a function from PIL RGB image to uint8 [image_size, image_size, 3].

    At an `image_size` other than the published one, the resize scales with it. `to=eval_crop` leaves it a PIL image.
    """
    size = image_size or spec.input_size
    return functools.partial(to, resize=spec.resize_for(size), crop=size, rounding=spec.crop_rounding)


def train_transform(config):
    """The training augmentation of a TrainConfig: a function from PIL RGB image to uint8 [image_size, image_size, 3].

    Random resized crop (scale min_crop-1, ratio 3/4-4/3), horizontal flip, then the optional color jitter, policy and
    erasing, all torchvision's. They draw from torch's global generator, which the loader seeds for every image.
    """
    import numpy as np
    import torch
    from torchvision.transforms import v2

    size = config.image_size
    steps = [
        v2.RandomResizedCrop(size, scale=(config.min_crop, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if config.color_jitter:
        steps.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
    if config.auto_augment != "none":
        steps.append({"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}[config.auto_augment]())
    on_image = v2.Compose(steps)
    # Mid-grey, the pixel that normalization maps to about zero.
    erase = v2.RandomErasing(config.random_erasing, value=128) if config.random_erasing else None

    def transform(image):
        pixels = np.asarray(on_image(image))
        if erase is None:
            return pixels
        return erase(torch.from_numpy(pixels.copy()).permute(2, 0, 1)).permute(1, 2, 0).numpy()

    return transform
