"""Draw a small image data set in ImageNet's layout, so that everything can be tried without a download.

    python tools/make_sample_data.py sample_data

Writes train/ and val/ with ten classes of JPEG files. Classes differ in shape and texture while colors are random, so a
network cannot classify by color. As in real data sets, sizes and aspect ratios vary, some files are grayscale and some
carry an EXIF orientation, which readers must ignore. The same arguments draw the same images.
"""

import dataclasses
import math
import pathlib
import random
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common import cli, files
from common.errors import UserError

EXIF_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Options of this program."""

    train_per_class: int = cli.option(100, "training images of each class", low=1)
    val_per_class: int = cli.option(20, "validation images of each class", low=1)
    seed: int = cli.option(0, "which images are drawn", low=0)

    def __post_init__(self) -> None:
        cli.check_ranges(self)


class Canvas:
    """An image being drawn: white pixels of `mask` become the foreground color."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.width = rng.randint(120, 320)
        self.height = round(self.width * rng.uniform(0.6, 1.5))
        self.mask = Image.new("L", (self.width, self.height))
        self.draw = ImageDraw.Draw(self.mask)
        self.unit = min(self.width, self.height) * rng.uniform(0.07, 0.13)  # radius of a shape, or width of a stripe

    def scattered(self, paint: Callable[[float, float, float], None]) -> None:
        """Call paint(x, y, radius) on a jittered grid, so that every crop of the image contains shapes."""
        pitch = 3.2 * self.unit
        for row in range(math.ceil(self.height / pitch) + 1):
            for column in range(math.ceil(self.width / pitch) + 1):
                x, y = ((k + self.rng.uniform(-0.12, 0.12)) * pitch for k in (column, row))
                paint(x, y, self.unit * self.rng.uniform(0.85, 1.15))

    def polygon(self, x: float, y: float, radius: float, corners: int, turn: float) -> None:
        """Draw a filled regular polygon around (x, y), rotated by `turn` radians."""
        angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
        self.draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=255)

    def from_function(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        """Make pixels white where function(x, y) > 0, with x and y in units of `unit`."""
        y, x = np.mgrid[: self.height, : self.width] / self.unit
        self.mask.paste(Image.fromarray(np.uint8(255 * (function(x, y) > 0))))


def discs(c: Canvas) -> None:
    c.scattered(lambda x, y, r: c.draw.ellipse((x - r, y - r, x + r, y + r), fill=255))


def rings(c: Canvas) -> None:
    c.scattered(lambda x, y, r: c.draw.ellipse((x - r, y - r, x + r, y + r), outline=255, width=max(2, round(r / 3))))


def squares(c: Canvas) -> None:
    c.scattered(lambda x, y, r: c.polygon(x, y, r * 1.2, 4, math.pi / 4 + c.rng.uniform(-0.15, 0.15)))


def triangles(c: Canvas) -> None:
    c.scattered(lambda x, y, r: c.polygon(x, y, r * 1.3, 3, -math.pi / 2 + c.rng.uniform(-0.3, 0.3)))


def crosses(c: Canvas) -> None:
    def cross(x: float, y: float, r: float) -> None:
        c.draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=255)
        c.draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=255)

    c.scattered(cross)


def horizontal_stripes(c: Canvas) -> None:
    phase = c.rng.uniform(0, 6)
    c.from_function(lambda x, y: np.sin(math.pi * y + phase))


def vertical_stripes(c: Canvas) -> None:
    phase = c.rng.uniform(0, 6)
    c.from_function(lambda x, y: np.sin(math.pi * x + phase))


def checkerboard(c: Canvas) -> None:
    phase = c.rng.uniform(0, 6)
    c.from_function(lambda x, y: np.sin(math.pi * x / 1.5 + phase) * np.sin(math.pi * y / 1.5 + phase))


def waves(c: Canvas) -> None:
    phase = c.rng.uniform(0, 6)
    c.from_function(lambda x, y: np.sin(math.pi * y + 2.5 * np.sin(1.2 * x + phase)))


def grain(c: Canvas) -> None:
    noise = np.random.Generator(np.random.Philox(c.rng.getrandbits(64))).integers(0, 256, (c.height, c.width), np.uint8)
    blurred = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(max(1.0, c.unit / 8))))
    c.mask.paste(Image.fromarray(np.uint8(255 * (blurred > np.median(blurred)))))


CLASSES = (checkerboard, crosses, discs, grain, horizontal_stripes, rings, squares, triangles, vertical_stripes, waves)


def two_colors(rng: random.Random) -> list[tuple[int, ...]]:
    """RGB values of a dark foreground and a light background, each a tinted gray."""
    grays = rng.randint(20, 90), rng.randint(150, 225)
    return [tuple(min(255, max(0, gray + rng.randint(-30, 30))) for _ in range(3)) for gray in grays]


def draw(shape: Callable[[Canvas], None], rng: random.Random) -> Image.Image:
    """One RGB or grayscale image of a class."""
    canvas = Canvas(rng)
    shape(canvas)
    foreground, background = (Image.new("RGB", canvas.mask.size, color) for color in two_colors(rng))
    image = Image.composite(foreground, background, canvas.mask.filter(ImageFilter.GaussianBlur(0.7)))
    strength, seed = rng.uniform(2, 12), rng.getrandbits(64)
    noise = np.random.Generator(np.random.Philox(seed)).normal(0, strength, (*canvas.mask.size[::-1], 1))
    image = Image.fromarray(np.uint8(np.clip(np.asarray(image) + noise, 0, 255)))
    return image.convert("L") if rng.random() < 0.1 else image


def save(image: Image.Image, path: pathlib.Path, rng: random.Random) -> None:
    """Write a JPEG of random quality; one in ten has an EXIF orientation."""
    options: dict[str, Any] = {"quality": rng.randint(75, 95)}
    if rng.random() < 0.1:
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = rng.choice((3, 6, 8))
        options["exif"] = exif
    image.save(path, "JPEG", **options)


def make(folder: str | pathlib.Path, config: SampleConfig) -> int:
    """Write the data set; returns the number of images.

    Raises:
      UserError: `folder` is not empty, or another program writes it.
    """
    folder = pathlib.Path(folder)
    files.make_folders(folder, "DIR")
    with files.claimed(folder, "DIR"):
        if not files.is_empty(folder):
            raise UserError(f"DIR: {folder} is not an empty folder; choose another one")
        return _draw_all(folder, config)


def _draw_all(folder: pathlib.Path, config: SampleConfig) -> int:
    count = 0
    for part, per_class in (("train", config.train_per_class), ("val", config.val_per_class)):
        for shape in CLASSES:
            target = folder / part / shape.__name__
            target.mkdir(parents=True)
            for number in range(per_class):
                rng = random.Random(f"{config.seed} {part} {shape.__name__} {number}")
                save(draw(shape, rng), target / f"{shape.__name__}_{number:05d}.JPEG", rng)
                count += 1
    return count


if __name__ == "__main__":
    with cli.exit_on_error():
        parser = cli.parser_for(SampleConfig(), __doc__)
        parser.add_argument("folder", metavar="DIR", help="folder to create")
        given = vars(parser.parse_args())
        folder = given.pop("folder")
        print(f"{make(folder, dataclasses.replace(SampleConfig(), **given))} images in {folder}")
