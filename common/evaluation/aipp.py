"""Static AIPP, the normalization of uint8 pixels on an Ascend device: atc's configuration file, and its emulation."""

import pathlib
import re
from collections.abc import Sequence

import numpy as np

from common.errors import UserError

# Operations that AippEmulator computes, which are also the defaults of these keys.
SUPPORTED = {
    "aipp_mode": "static",
    "input_format": "RGB888_U8",
    "crop": "false",
    "csc_switch": "false",
    "padding": "false",
}


def config_text(mean: Sequence[float], std: Sequence[float], image_size: int) -> str:
    """AIPP configuration of a network with square RGB input.

    out = (pixel - mean_chn - min_chn) * var_reci_chn in float16; mean_chn takes integers only, so min_chn holds the
    whole mean. (ATC manual, "AIPP configuration".)

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


def read_config(path: str) -> dict[str, str]:
    """Key -> value of the one aipp_op block of a configuration file.

    Raises:
      UserError: unreadable, several blocks, or an operation that AippEmulator does not compute.
    """
    try:
        content = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--aipp-config: {path} cannot be read ({error})") from error
    content = re.sub(r"#.*", "", content)
    if content.count("aipp_op") != 1:
        raise UserError(f"--aipp-config: {path} has {content.count('aipp_op')} aipp_op blocks, expected one")
    config = dict(re.findall(r"(\w+)\s*:\s*(\S+)", content))
    for key, supported in SUPPORTED.items():
        if config.get(key, supported) != supported:
            raise UserError(f"--aipp-config: {path} has {key}: {config[key]}, only {supported} can be computed here")
    return config


class AippEmulator:
    """Computes on the host, in float16, what an AIPP configuration file makes a device compute."""

    def __init__(self, path: str) -> None:
        config = read_config(path)
        self._swap_red_blue = config.get("rbuv_swap_switch", "false") == "true"
        pixels = np.arange(256, dtype=np.float16)
        self._table = np.empty((3, 256), np.float32)  # per channel of the network's input: pixel value -> float16 value
        for i in range(3):
            centered = pixels - np.float16(config.get(f"mean_chn_{i}", 0)) - np.float16(config.get(f"min_chn_{i}", 0))
            self._table[i] = centered * np.float16(config.get(f"var_reci_chn_{i}", 1))

    def normalize_into(self, planes_CHW: np.ndarray, pixels_HWC: np.ndarray) -> None:
        """Fill float planes from uint8 pixels; the counterpart of common.data.transforms.normalize_into."""
        for channel in range(3):
            source = 2 - channel if self._swap_red_blue else channel
            planes_CHW[channel] = self._table[channel][pixels_HWC[:, :, source]]
