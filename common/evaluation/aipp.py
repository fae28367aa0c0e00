"""Static AIPP, the normalization that a device does itself on uint8 pixels: as a file for atc, as arithmetic here."""

import pathlib
import re

import numpy as np

from common.errors import UserError


def text(mean, std, image_size):
    """The AIPP file of a network that takes RGB pixels.

    out = (pixel - mean_chn - min_chn) * var_reci_chn in float16; mean_chn holds whole numbers only, so everything goes
    into min_chn. (ATC manual, "AIPP configuration".)

    Args:
      mean, std: normalization of RGB values in [0, 1].
      image_size: side of the input, pixels.
    """
    lines = [
        "aipp_op {",
        "    aipp_mode: static",
        "    related_input_rank: 0",
        "    input_format: RGB888_U8",
        f"    src_image_size_w: {image_size}",
        f"    src_image_size_h: {image_size}",
        "    crop: false",
        "    csc_switch: false",
        "    rbuv_swap_switch: false",
    ]
    lines += [f"    min_chn_{i}: {255 * value:.10g}" for i, value in enumerate(mean)]
    lines += [f"    var_reci_chn_{i}: {1 / (255 * value):.16f}" for i, value in enumerate(std)]
    return "\n".join([*lines, "}"]) + "\n"


def read(path):
    """Read an AIPP file.

    Returns:
      dict: key -> word, of the one aipp_op block.
    Raises:
      UserError: unreadable, several blocks, or a mode, format or step that the laptop's arithmetic does not know.
    """
    try:
        content = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--aipp-config: {path} cannot be read ({error})") from error
    content = re.sub(r"#.*", "", content)
    found = dict(re.findall(r"(\w+)\s*:\s*(\S+)", content))
    if content.count("aipp_op") != 1:
        raise UserError(f"--aipp-config: {path} has {content.count('aipp_op')} aipp_op blocks, expected one")
    known = {
        "aipp_mode": ("static",),
        "input_format": ("RGB888_U8",),
        "crop": ("false",),
        "csc_switch": ("false",),
        "padding": ("false",),
    }
    for key, allowed in known.items():
        if found.get(key, allowed[0]) not in allowed:
            raise UserError(f"--aipp-config: {path} has {key}: {found[key]}, only {allowed[0]} can be computed here")
    return found


def lookup_table(config):
    """What AIPP makes of every pixel value.

    Args:
      config: dict from `read`.
    Returns:
      (table, swap): float32 [3, 256] of float16 values, per channel of the network's input; whether the pixels come as
      BGR.
    """
    pixels = np.arange(256, dtype=np.float16)
    table = np.empty((3, 256), np.float32)
    for i in range(3):
        centered = pixels - np.float16(config.get(f"mean_chn_{i}", 0)) - np.float16(config.get(f"min_chn_{i}", 0))
        table[i] = centered * np.float16(config.get(f"var_reci_chn_{i}", 1))
    return table, config.get("rbuv_swap_switch", "false") == "true"
