"""Training pixels of JPEG files by simplejpeg and torchvision against PIL; what is left to PIL; jitter."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from common.config import TrainConfig
from common.data import augment, decode, jpeg
from common.errors import UserError

CONFIG = dataclasses.replace(TrainConfig(), image_size=64)


def pixels_of(width, height, mode="RGB"):
    rng = np.random.default_rng(width * 1000 + height)
    small = Image.fromarray(rng.integers(0, 256, (12, 17, 4), dtype=np.uint8), "RGBA").resize((width, height))
    return small.convert("RGB").convert(mode)


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def exif_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


JPEGS = {
    "4:2:0": saved(pixels_of(203, 157), subsampling="4:2:0"),
    "4:2:2": saved(pixels_of(203, 157), subsampling="4:2:2"),
    "4:4:4": saved(pixels_of(203, 157), subsampling="4:4:4"),
    "gray": saved(pixels_of(203, 157, "L")),
    "progressive": saved(pixels_of(203, 157), progressive=True),
    "exif": saved(pixels_of(203, 157), exif=exif_turned()),
    "restart markers": saved(pixels_of(203, 157), restart_marker_blocks=3),
    "no end marker": saved(pixels_of(203, 157)) + bytes(2000),
    "one pixel": saved(pixels_of(1, 1)),
}


@pytest.fixture(params=["simplejpeg", "torchvision"])
def decoder(request, monkeypatch):
    if request.param == "torchvision":
        monkeypatch.setattr(jpeg, "_simplejpeg", lambda: None)
    jpeg.check_pixels.cache_clear()
    assert jpeg.check_pixels() is not None
    yield request.param
    jpeg.check_pixels.cache_clear()


@pytest.mark.parametrize("kind", JPEGS)
def test_every_kind_of_jpeg_has_pils_pixels_down_to_any_row(kind, decoder):
    content = JPEGS[kind]
    expected, head = np.asarray(decode.open_rgb("x", content)), jpeg.header(content)
    assert (head.height, head.width) == expected.shape[:2]
    for bottom in {1, 2, 15, 16, 17, 100, 101, head.height - 1, head.height}:
        if bottom <= head.height:
            found = jpeg.decode(content, head, bottom).permute(1, 2, 0).numpy()
            assert np.array_equal(found[:bottom], expected[:bottom]), bottom


def test_rows_below_the_crop_are_not_decoded():
    rows = jpeg.decode(JPEGS["4:2:0"], jpeg.header(JPEGS["4:2:0"]), 40).shape[1]
    assert 40 <= rows < 60
    for kind in ("progressive", "no end marker"):  # rows do not follow each other, or the file may be cut short
        assert jpeg.decode(JPEGS[kind], jpeg.header(JPEGS[kind]), 40).shape[1] == 157


def test_the_end_of_a_thumbnail_is_not_that_of_the_image():
    content = saved(pixels_of(203, 157), comment=b"thumbnail \xff\xd9")
    head = jpeg.header(content)
    cut = content[: head.height_at + 800]
    assert b"\xff\xd9" in cut[-1024:]
    with pytest.raises((ValueError, RuntimeError)):
        jpeg.decode(cut, head, 40)


OTHERS = {
    "cmyk": saved(pixels_of(203, 157, "CMYK")),
    "png": (lambda file: (pixels_of(203, 157).convert("RGBA").save(file, "PNG"), file.getvalue())[1])(io.BytesIO()),
    "empty": b"",
    "cut in the header": JPEGS["4:2:0"][:100],
    "height 0": JPEGS["4:2:0"].replace(b"\x08\x00\x9d\x00\xcb", b"\x08\x00\x00\x00\xcb"),
    "12 bits": JPEGS["4:2:0"].replace(b"\x08\x00\x9d\x00\xcb", b"\x0c\x00\x9d\x00\xcb"),
    "giant": JPEGS["4:2:0"].replace(b"\x08\x00\x9d\x00\xcb", b"\x08\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_left_to_pil(kind):
    assert jpeg.header(OTHERS[kind]) is None
    transform = augment.TrainTransform(CONFIG)
    torch.manual_seed(0)
    if kind not in ("cmyk", "png"):
        with pytest.raises(decode.BadImage):
            transform("x", OTHERS[kind])
        return
    found = transform("x", OTHERS[kind])
    torch.manual_seed(0)
    assert np.array_equal(found, transform.from_image(decode.open_rgb("x", OTHERS[kind])))


def old_way(content, seed, size=64):
    torch.manual_seed(seed)
    crop = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    return np.asarray(crop(decode.open_rgb("x", content))).astype(int)


def new_way(content, seed, **options):
    transform = augment.TrainTransform(dataclasses.replace(CONFIG, **options))
    torch.manual_seed(seed)
    return transform("x", content).astype(int)


@pytest.mark.parametrize("kind", JPEGS)
def test_crops_and_flips_are_torchvisions_on_pil_within_one_level(kind, decoder):
    for seed in range(12):
        expected = old_way(JPEGS[kind], seed)
        assert np.abs(new_way(JPEGS[kind], seed) - expected).max() <= 1
        assert np.array_equal(new_way(JPEGS[kind], seed, decoder="pil"), expected)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (1, 1), (3, 1000), (1000, 3), (9, 12)])
@pytest.mark.parametrize("min_crop", [0.08, 1.0])
def test_crops_are_drawn_with_the_random_numbers_of_torchvision(size, min_crop):
    transform = augment.TrainTransform(dataclasses.replace(CONFIG, min_crop=min_crop))
    theirs = v2.RandomResizedCrop(64, scale=(min_crop, 1.0))
    for seed in range(30):
        torch.manual_seed(seed)
        found, then = transform._draw(*size), torch.rand(1)
        torch.manual_seed(seed)
        expected = theirs.make_params([torch.empty((3, size[1], size[0]), device="meta")])
        assert found == tuple(expected[name] for name in ("top", "left", "height", "width"))
        assert torch.equal(then, torch.rand(1))


def test_a_file_that_is_cut_short_is_a_bad_image_whatever_the_crop(decoder):
    cut = JPEGS["4:2:0"][:-200]
    for seed in range(12):
        with pytest.raises(decode.BadImage, match="truncated"):
            new_way(cut, seed)


def test_large_crops_are_decoded_at_a_lower_resolution_and_look_the_same(monkeypatch):
    """A crop of 1600 x 1200 pixels or less to 64: an eighth leaves 2 pixels per output pixel from 1024 on."""
    content = saved(pixels_of(1600, 1200))
    reduced, jpeg_file = [], type(Image.open(io.BytesIO(content)))

    def counted(image, mode, size):
        found = original(image, mode, size)
        reduced.append(-(-1600 // image.width))
        return found

    original = jpeg_file.draft
    monkeypatch.setattr(jpeg_file, "draft", counted)
    for seed in range(12):
        assert np.abs(new_way(content, seed) - old_way(content, seed)).mean() < 0.6
    assert {2, 4} <= set(reduced) <= {2, 4, 8}


def test_color_jitter_has_torchvisions_factors_and_formulas():
    """torchvision cuts off to integers after each of the three steps; here once: at most 3 levels."""
    jitter, image = v2.ColorJitter(0.4, 0.4, 0.4), torch.from_numpy(np.array(pixels_of(64, 64)))
    ours = augment._ColorJitter(0.4, 64)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = jitter(image.permute(2, 0, 1)).permute(1, 2, 0)
        torch.manual_seed(seed)
        found = image.clone()
        ours(found)
        difference = found.int() - expected.int()
        assert difference.abs().max() <= 3 and difference.float().mean().abs() < 1.5
        assert (found.int() - image.int()).abs().max() > 3


def test_the_result_is_written_into_its_place_in_the_batch():
    batch, transform = torch.zeros(3, 64, 64, 3, dtype=torch.uint8), augment.TrainTransform(CONFIG)
    torch.manual_seed(5)
    transform("x", JPEGS["4:2:0"], batch[1])
    assert np.array_equal(batch[1].numpy(), new_way(JPEGS["4:2:0"], 5))
    assert not batch[0].any() and not batch[2].any()


def test_a_decoder_of_other_pixels_is_not_used(monkeypatch):
    assert augment.resolve_decoder("auto") == "fast"
    assert augment.decoder_fingerprint("fast").startswith("fast ")
    monkeypatch.setattr(jpeg, "decode", lambda *_: torch.zeros(3, 58, 77, dtype=torch.uint8))
    jpeg.check_pixels.cache_clear()
    try:
        assert augment.resolve_decoder("auto") == "pil"
        with pytest.raises(UserError, match="^--decoder: fast, but"):
            augment.resolve_decoder("fast")
    finally:
        jpeg.check_pixels.cache_clear()
