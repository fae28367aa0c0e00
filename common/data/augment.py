"""Training augmentation: image file to uint8 [image_size, image_size, 3], written into its place in the batch.

Random numbers come from torch's global generator, which the loader seeds for every image, in the order of torchvision's
transforms. With the decoder "fast", JPEG files are decoded by common/data/jpeg.py and resized as uint8; of a crop that
is several times as large as the output, PIL decodes a half, quarter or eighth of the resolution. All other files, and
those that it cannot read, are decoded and resized by PIL.
"""

import functools
import hashlib
import io
import math
import typing
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from common.data import jpeg
from common.data.decode import open_rgb
from common.data.transforms import eval_crop_transform
from common.errors import UserError
from common.files import StrPath
from common.spec import ModelSpec

AUTO, FAST, PIL = "auto", "fast", "pil"

# A reduced resolution must still give this many decoded pixels per pixel of the output, in each direction: PIL's
# reducing_gap, "2.0 or greater may be fast and fair".
_REDUCING_GAP = 2
_RATIOS = (3 / 4, 4 / 3)  # of the width and height of a crop
_GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's, ITU-R 601-2


class AugmentationOptions(typing.Protocol):
    """The options that TrainTransform reads; documented in TrainConfig."""

    @property
    def image_size(self) -> int: ...
    @property
    def train_crop(self) -> str: ...
    @property
    def min_crop(self) -> float: ...
    @property
    def color_jitter(self) -> float: ...
    @property
    def auto_augment(self) -> str: ...
    @property
    def random_erasing(self) -> float: ...
    @property
    def decoder(self) -> str: ...


def resolve_decoder(decoder: str) -> str:
    """The decoder that `auto` stands for on this machine.

    Raises:
      UserError: the fast one was asked for and does not give the pixels of PIL here.
    """
    if decoder == PIL or jpeg.check_pixels() is not None:
        return PIL if decoder == PIL else FAST
    if decoder == FAST:
        raise UserError(
            "--decoder: fast, but this torchvision (or simplejpeg) does not read a JPEG as PIL does; use pil"
        )
    return PIL


@functools.cache
def decoder_fingerprint(decoder: str) -> str:
    """The decoder of this machine with a hash of the pixels that it makes of a built-in file."""
    name, pixels = resolve_decoder(decoder), jpeg.check_pixels()
    if name == PIL or pixels is None:
        return f"{PIL} {Image.__version__}"
    out = torch.empty(32, 32, 3, dtype=torch.uint8)
    _resize_into(out, pixels[:, 5:50, 7:70])
    return f"{name} {hashlib.sha256(out.numpy().tobytes()).hexdigest()[:8]}"


def _resize_into(out_HWC: torch.Tensor, pixels_CHW: torch.Tensor) -> None:
    """Bilinear with antialiasing, as torchvision's resize of uint8: at most one level from PIL's."""
    torch.ops.aten._upsample_bilinear2d_aa.out(
        pixels_CHW[None], out_HWC.shape[:2], False, None, None, out=out_HWC.permute(2, 0, 1)[None]
    )


def _uniform(low: float, high: float) -> float:
    return torch.empty(1).uniform_(low, high).item()


class TrainTransform:
    """The augmentation of `options`.

    Random resized crop (scale min_crop to 1, ratio 3/4 to 4/3) or, with train_crop "center", the evaluation's crop of
    `spec`: objects have the size that they have in evaluation (https://arxiv.org/abs/1906.06423). Horizontal flip,
    then the optional color jitter, policy and erasing with the parameters of torchvision.
    """

    def __init__(self, options: AugmentationOptions, spec: ModelSpec | None = None) -> None:
        size, jitter = options.image_size, options.color_jitter
        self._shape = (size, size, 3)
        self._is_fast = options.train_crop != "center" and resolve_decoder(options.decoder) == FAST
        self._min_crop, self._log_ratios = options.min_crop, torch.tensor(_RATIOS).log().tolist()
        self._center: Callable[[Image.Image], Image.Image] | None = None
        if options.train_crop == "center":
            assert spec is not None
            self._center = eval_crop_transform(spec, size)
        self._jitter = _ColorJitter(jitter, size) if jitter else None
        self._policy = self._erase = None
        if options.auto_augment != "none" or options.random_erasing:
            from torchvision.transforms import v2  # takes a second

            policies = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
            self._policy = policies[options.auto_augment]() if options.auto_augment != "none" else None
            # 128 is mid-gray, which normalization maps to about zero.
            self._erase = v2.RandomErasing(options.random_erasing, value=128) if options.random_erasing else None

    def __call__(self, path: StrPath, content: bytes | None, out_HWC: torch.Tensor | None = None) -> np.ndarray:
        """The augmented image of a file, uint8 [image_size, image_size, 3].

        Args:
          content: of the file; None: read it.
          out_HWC: where to write it; default: a new array.
        Raises:
          BadImage: the file does not decode.
        """
        if out_HWC is None:
            out_HWC = torch.empty(self._shape, dtype=torch.uint8)
        head = jpeg.header(content) if self._is_fast and content else None
        if head is None or content is None:
            image = open_rgb(path, content)
            self._crop_pil(image, None if self._center else self._draw(image.width, image.height), out_HWC)
        else:
            self._crop_jpeg(path, content, head, out_HWC)
        self._augment(out_HWC)
        return out_HWC.numpy()

    def from_image(self, image: Image.Image) -> np.ndarray:
        """The augmented pixels of an RGB image."""
        out = torch.empty(self._shape, dtype=torch.uint8)
        self._crop_pil(image, None if self._center else self._draw(image.width, image.height), out)
        self._augment(out)
        return out.numpy()

    def _draw(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop, with the numbers that torchvision's RandomResizedCrop draws."""
        for _ in range(10):
            area = width * height * _uniform(self._min_crop, 1.0)
            ratio = torch.empty(1).uniform_(*self._log_ratios).exp().item()
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(torch.randint(height - crop_height + 1, (1,)))
                return top, int(torch.randint(width - crop_width + 1, (1,))), crop_height, crop_width
        # The largest crop of an allowed ratio, in the center.
        crop_width, crop_height = min(width, round(height * _RATIOS[1])), min(height, round(width / _RATIOS[0]))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width

    def _crop_pil(
        self, image: Image.Image, box: tuple[int, int, int, int] | None, out_HWC: torch.Tensor, scale: int = 1
    ) -> None:
        """Crop and resize by PIL; `scale`: how much smaller the image is than the one that the box counts in."""
        if box is None:
            assert self._center is not None
            image = self._center(image)
        else:
            top, left, height, width = box
            edges = left, top, left + width, top + height
            if scale == 1:  # torchvision's order: no pixel outside the crop is used
                image = image.crop(edges).resize(self._shape[:2], Image.Resampling.BILINEAR)
            else:
                right, bottom = min(edges[2] / scale, image.width), min(edges[3] / scale, image.height)
                reduced = left / scale, top / scale, right, bottom
                image = image.resize(self._shape[:2], Image.Resampling.BILINEAR, reduced)
        out_HWC.numpy()[...] = np.asarray(image)

    def _crop_jpeg(self, path: StrPath, content: bytes, head: jpeg.Header, out_HWC: torch.Tensor) -> None:
        box = top, left, height, width = self._draw(head.width, head.height)
        needed = _REDUCING_GAP * self._shape[0]
        scale = next((n for n in (8, 4, 2) if min(height, width) >= n * needed), 1)
        try:
            if scale > 1:
                with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
                    image.draft("RGB", (head.width // scale, head.height // scale))  # 1 / scale, sides rounded up
                    self._crop_pil(image.convert("RGB"), box, out_HWC, scale)
            else:
                pixels = jpeg.decode(content, head, top + height)
                _resize_into(out_HWC, pixels[:, top : top + height, left : left + width])
        except (RuntimeError, ValueError, OSError, SyntaxError):  # PIL reads it, or says why not
            self._crop_pil(open_rgb(path, content), box, out_HWC)

    def _augment(self, out_HWC: torch.Tensor) -> None:
        """Everything after the crop, in place."""
        if torch.rand(1) < 0.5:
            out_HWC.copy_(out_HWC.flip(1))
        if self._jitter:
            self._jitter(out_HWC)
        if self._policy:
            out_HWC.numpy()[...] = np.asarray(self._policy(Image.fromarray(out_HWC.numpy())))
        if self._erase:
            out_HWC.permute(2, 0, 1).copy_(self._erase(out_HWC.permute(2, 0, 1)))


class _ColorJitter:
    """torchvision's ColorJitter of brightness, contrast and saturation, cut to integers once instead of three times.

    Args:
      strength: factors are drawn from 1 - strength to 1 + strength.
      size: side of the images.
    """

    def __init__(self, strength: float, size: int) -> None:
        self._range = max(0.0, 1 - strength), 1 + strength
        self._buffers = torch.empty(2, size * size, 3)  # reused: fresh pages cost as much as the arithmetic
        self._weights, self._identity = torch.tensor(_GRAY_WEIGHTS), torch.eye(3)

    def __call__(self, pixels_HWC: torch.Tensor) -> None:
        order, (values, other) = torch.randperm(4).tolist(), self._buffers
        factors = [_uniform(*self._range) for _ in range(3)]
        values.copy_(pixels_HWC.view(-1, 3))
        for step in order:
            if step == 3:  # hue, which is off
                continue
            factor = factors[step]
            if step == 0:
                values.mul_(factor)
            elif step == 1:
                gray = float(values.mean(0) @ self._weights)
                values.mul_(factor).add_((1 - factor) * gray)
            else:
                # One matrix for factor * color + (1 - factor) * gray: products of N x 3 by 3 and by 1 x 3 are slow.
                torch.mm(values, factor * self._identity + (1 - factor) * self._weights[:, None], out=other)
                values, other = other, values
            if factor > 1:  # else a mean of values in range
                values.clamp_(0, 255)
        pixels_HWC.view(-1, 3).copy_(values.int())  # twice as fast as from float32 to uint8
