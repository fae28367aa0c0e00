"""Images of more than 8 bits per channel, against values computed without PIL; what must be refused."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.data import audit, decode

RNG = np.random.default_rng(0)
GRAY, GRAY12 = RNG.integers(0, 65536, (7, 10)), RNG.integers(0, 4096, (7, 10))
COLOR = RNG.integers(0, 65536, (7, 10, 4))
HIGH = GRAY >> 8  # of 16 bits the high byte: 257 * v, an 8-bit v spread over 16 bits, gives v


def png(values_HWC, color_type):
    height, width = values_HWC.shape[:2]

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(planes, bits, samples, order, compression=1, sample_format=1, photometric=1, extra=None):
    """A TIFF of 7 x 10 pixels.

    Args:
      planes: bytes of the pixels in the order of the file; several where each channel has its own plane.
      order: "<" or ">".
      compression: 1 none, 8 deflate.
      sample_format: 1 unsigned, 2 signed, 3 float.
      photometric: 0 white is 0, 1 black is 0, 2 RGB, 5 CMYK.
      extra: kind of the last sample: 2 alpha.
    """
    if compression == 8:
        planes = [zlib.compress(plane) for plane in planes]
    tags = {256: [10], 257: [7], 258: [bits] * samples, 259: [compression], 262: [photometric], 273: [0] * len(planes)}
    tags |= {277: [samples], 278: [7], 279: [len(plane) for plane in planes], 284: [1 + (len(planes) > 1)]}
    tags |= {339: [sample_format] * samples} | ({338: [extra]} if extra is not None else {})
    long = {273, 279}  # 4 bytes a value; the others have 2

    def packed(tag):
        return struct.pack(f"{order}{len(tags[tag])}{'I' if tag in long else 'H'}", *tags[tag])

    after = 8 + 2 + 12 * len(tags) + 4  # values of more than 4 bytes, then the pixels
    pixels = after + sum(len(packed(tag)) for tag in tags if len(packed(tag)) > 4)
    tags[273] = [pixels + sum(tags[279][:i]) for i in range(len(planes))]
    entries = outside = b""
    for tag in sorted(tags):
        value = packed(tag)
        if len(value) > 4:
            value, outside = struct.pack(order + "I", after + len(outside)), outside + value
        entries += struct.pack(order + "HHI", tag, 4 if tag in long else 3, len(tags[tag])) + value.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    return head + entries + struct.pack(order + "I", 0) + outside + b"".join(planes)


def packed12(values):
    pairs = values.reshape(-1, 2)
    return b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())


def read(path, content):
    path.write_bytes(content)
    return np.asarray(decode.open_rgb(path)).astype(int)


def gray_image(value):
    return value[:, :, None].repeat(3, axis=2)


RGB, LA = COLOR[:, :, :3], COLOR[:, :, :2]
FILES = {
    "png": (png(GRAY, 0), gray_image(HIGH)),
    "png la": (png(LA, 4), gray_image(LA[:, :, 0] >> 8)),
    "png rgb": (png(RGB, 2), RGB >> 8),
    "png rgba": (png(COLOR, 6), RGB >> 8),
    "pgm": (b"P5 10 7 65535\n" + GRAY.astype(">u2").tobytes(), gray_image(HIGH)),
    "pgm text": (b"P2 10 7 65535\n" + " ".join(map(str, GRAY.ravel())).encode() + b"\n", gray_image(HIGH)),
    # Values 0..4095 are stretched to 0..65535 before the high byte is taken.
    "pgm 4095": (
        b"P5 10 7 4095\n" + GRAY12.astype(">u2").tobytes(),
        gray_image(np.rint(GRAY12 * 65535 / 4095).astype(int) >> 8),
    ),
    "ppm": (b"P6 10 7 65535\n" + RGB.astype(">u2").tobytes(), np.rint(RGB / 65535 * 255)),
    "12-bit": (tiff([packed12(GRAY12)], 12, 1, "<"), gray_image(GRAY12 >> 4)),
    "12-bit deflate": (tiff([packed12(GRAY12)], 12, 1, "<", 8), gray_image(GRAY12 >> 4)),
    "white is 0": (tiff([GRAY.astype("<u2").tobytes()], 16, 1, "<", photometric=0), gray_image(255 - HIGH)),
}
for order in "<>":
    for compression in (1, 8):
        kind, word = f"{order} {compression}", order + "u2"
        FILES |= {
            f"tiff {kind}": (tiff([GRAY.astype(word).tobytes()], 16, 1, order, compression), gray_image(HIGH)),
            f"tiff rgb {kind}": (
                tiff([RGB.astype(word).tobytes()], 16, 3, order, compression, photometric=2),
                RGB >> 8,
            ),
            f"tiff rgba {kind}": (
                tiff([COLOR.astype(word).tobytes()], 16, 4, order, compression, photometric=2, extra=2),
                RGB >> 8,
            ),
            f"tiff la, 8 bits {kind}": (
                tiff([(LA >> 8).astype("u1").tobytes()], 8, 2, order, compression, extra=2),
                gray_image(LA[:, :, 0] >> 8),
            ),
        }
    planes = [RGB[:, :, k].astype(order + "u2").tobytes() for k in range(3)]
    FILES[f"planes {order}"] = tiff(planes, 16, 3, order, 8, photometric=2), RGB >> 8


@pytest.mark.parametrize("kind", FILES)
def test_sixteen_bits_are_scaled_to_eight(tmp_path, kind):
    content, expected = FILES[kind]
    assert np.array_equal(read(tmp_path / "x.png", content), expected)


def test_gray_spread_over_sixteen_bits_is_that_gray(tmp_path):
    gray = np.arange(70).reshape(7, 10) * 3
    for content in (png(gray * 257, 0), tiff([(gray * 257).astype(">u2").tobytes()], 16, 1, ">")):
        assert np.array_equal(read(tmp_path / "x.png", content), gray_image(gray))


def floats(order):
    return (GRAY / 65535).astype(order + "f4").tobytes()


REFUSED = {
    "float tiff": (tiff([floats("<")], 32, 1, "<", sample_format=3), "mode F, floats"),
    "float tiff, big-endian, deflate": (tiff([floats(">")], 32, 1, ">", 8, sample_format=3), "mode F, floats"),
    "float pgm": (b"Pf\n10 7\n-1.0\n" + floats("<"), "mode F, floats"),
    "32 bits": (tiff([GRAY.astype("<u4").tobytes()], 32, 1, "<"), "mode I, 32-bit integers"),
    "32 bits signed": (tiff([GRAY.astype(">i4").tobytes()], 32, 1, ">", sample_format=2), "mode I, signed integers"),
    "16 bits signed": (tiff([GRAY.astype("<u2").tobytes()], 16, 1, "<", sample_format=2), "mode I, signed integers"),
    "8 bits signed": (tiff([HIGH.astype("u1").tobytes()], 8, 1, "<", sample_format=2), "mode L, signed integers"),
    "planes": (
        tiff([RGB[:, :, k].astype("<u2").tobytes() for k in range(3)], 16, 3, "<", photometric=2),
        "mode RGB, uncompressed 16-bit planes",
    ),
    "16-bit la": (tiff([LA.astype("<u2").tobytes()], 16, 2, "<", extra=2), "it holds a TIFF of a pixel format that"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(100), "it holds HEIF or AVIF, which is not read; convert it"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "it holds a Git LFS pointer; run git lfs pull"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_known_range_is_refused(tmp_path, kind):
    content, reason = REFUSED[kind]
    with pytest.raises(decode.BadImage) as error:
        read(tmp_path / "x.tif", content)
    assert str(error.value).startswith(f"{tmp_path / 'x.tif'}: does not decode as an image ({reason}")
    assert audit.examine(str(tmp_path / "x.tif")).kind == "broken"


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    path = tmp_path / "x.jpg"
    os.mkfifo(path)
    for read_image in (decode.open_rgb, decode.read_file):
        with pytest.raises(decode.BadImage, match="not a regular file"):
            read_image(path)
    assert not decode.is_turned(path)


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_eight_bits_are_converted_by_pil_and_exif_is_ignored(tmp_path, mode):
    image = Image.fromarray((COLOR >> 8).astype(np.uint8), "CMYK" if mode == "CMYK" else "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "L", "RGB") else "x.png")
    image.save(path, exif=exif)
    with Image.open(path) as again:
        assert np.array_equal(np.asarray(decode.open_rgb(path)), np.asarray(again.convert("RGB")))
        assert again.size == decode.open_rgb(path).size == (10, 7)
