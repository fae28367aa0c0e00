"""From a decoded image to the input of a network, with every step that programs are known to do differently.

The defaults are the published evaluation transform. Legend: C channel, H W pixel.
"""

import dataclasses
import typing

from PIL import Image, ImageOps

from common.data import transforms
from common.spec import HALF_RANGE, ModelSpec, Triple

if typing.TYPE_CHECKING:
    import numpy as np

# Not one of PIL's filters: what OpenCV and torch.nn.functional.interpolate do by default.
NO_ANTIALIAS = "bilinear without antialiasing"
_CENTRAL_FRACTION = 0.875  # of TensorFlow-Slim's evaluation


@dataclasses.dataclass(frozen=True)
class InputPipeline:
    """Resize, crop, color order, normalization and layout of a network's input.

    Attributes:
      size: side of the input, pixels.
      resize: short side after the resize, pixels.
      rounding: of the offset of the center crop, "round" or "floor".
      interpolation: bilinear, bicubic, nearest, lanczos, box, hamming, or NO_ANTIALIAS.
      geometry: "center": resize the short side, crop the center; "squash": both sides to `resize`, crop; "central":
        the central 87.5 % of the image, squashed to `size`, as TensorFlow-Slim does.
      exif: whether the image is turned upright by its EXIF orientation.
      colors: "RGB" or "BGR".
      mean, std: of values in [0, 1], by position in the input.
      layout: "CHW"; "HWC": the numbers of an HWC array, read as CHW; "CWH": height and width exchanged.
    """

    size: int
    resize: int
    rounding: str = "round"
    interpolation: str = "bilinear"
    geometry: str = "center"
    exif: bool = False
    colors: str = "RGB"
    mean: Triple = HALF_RANGE[0]
    std: Triple = HALF_RANGE[1]
    layout: str = "CHW"

    @classmethod
    def of(cls, spec: ModelSpec, size: int) -> "InputPipeline":
        """The pipeline of a network for inputs of `size` pixels."""
        return cls(size, spec.resize_for(size), spec.crop_rounding, mean=spec.mean, std=spec.std)

    def same_pixels(self, other: "InputPipeline") -> bool:
        """Whether both crop the same uint8 pixels from every image."""
        names = ("size", "resize", "rounding", "interpolation", "geometry", "exif")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def crop(self, image: Image.Image) -> "np.ndarray":
        """RGB image -> uint8 pixels [size, size, 3], RGB."""
        import numpy as np

        if self.exif:
            image = ImageOps.exif_transpose(image)
        if self.geometry == "central":
            width, height = image.size
            left, top = (int((side - side * _CENTRAL_FRACTION) / 2) for side in (width, height))
            image = self._resized(image.crop((left, top, width - left, height - top)), self.size)
        elif self.geometry == "squash":
            image = transforms.center_crop(self._resized(image, self.resize), self.size, self.rounding)
        elif self.interpolation == NO_ANTIALIAS:
            scale = self.resize / min(image.size)
            sides = (max(self.resize, int(scale * image.width)), max(self.resize, int(scale * image.height)))
            image = transforms.center_crop(self._resized(image, *sides), self.size, self.rounding)
        else:
            image = transforms.eval_crop(image, self.resize, self.size, self.rounding, self._filter)
        return np.asarray(image)

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def _resized(self, image: Image.Image, width: int, height: int | None = None) -> Image.Image:
        size = (width, height or width)
        if self.interpolation != NO_ANTIALIAS:
            return image.resize(size, self._filter)
        return image.transform(size, Image.Transform.EXTENT, (0, 0, *image.size), Image.Resampling.BILINEAR)

    def normalize_into(self, planes_CHW: "np.ndarray", pixels_HWC: "np.ndarray") -> None:
        """Fill float planes from RGB pixels; see common.data.transforms.normalize_into."""
        ordered = pixels_HWC[:, :, ::-1] if self.colors == "BGR" else pixels_HWC
        transforms.normalize_into(planes_CHW, ordered, self.mean, self.std)
        if self.layout == "HWC":
            planes_CHW[...] = planes_CHW.transpose(1, 2, 0).reshape(planes_CHW.shape).copy()
        elif self.layout == "CWH":
            planes_CHW[...] = planes_CHW.transpose(0, 2, 1).copy()

    def arranged(self, pixels_HWC: "np.ndarray") -> "np.ndarray":
        """Pixels of a network that normalizes by itself: color order and layout only."""
        ordered = pixels_HWC[:, :, ::-1] if self.colors == "BGR" else pixels_HWC
        if self.layout == "HWC":  # such a network takes HWC: the error is CHW, read as HWC
            return ordered.transpose(2, 0, 1).reshape(ordered.shape)
        return ordered.transpose(1, 0, 2) if self.layout == "CWH" else ordered
