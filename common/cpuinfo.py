"""What /proc/cpuinfo says of the processor."""

import functools
import pathlib


@functools.cache
def field(*names: str) -> str:
    """The first field of these names, or an empty text; empty too where the system has no such file."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() in names), "")
