"""Rows of docs/benchmarks.json: what a benchmark found, on which machine, with which versions and command."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import cpuinfo
from tools import make_tables

PACKAGES = ("torch", "torchvision", "onnxruntime", "pillow", "numpy")
PEERS = {"simplejpeg": "simplejpeg", "timm": "timm", "nvidia.dali": "nvidia-dali-cuda120"}  # where imported


def add_option(parser):
    parser.add_argument("--record", metavar="FILE", help="JSON file of rows in which to replace or append this result")


def compared(ratios):
    """Fields of a row for the ratios (baseline time / zoo time) of the pairs."""
    digits = [float(f"{value:.3g}") for value in (statistics.median(ratios), min(ratios), max(ratios))]
    return dict(ratio=digits[0], range=digits[1:], pairs=len(ratios))


def limited(limit, fraction):
    """Fields of a row for what bounds the zoo's side, and the share of that bound that was reached."""
    return dict(limit=limit, fraction=round(fraction, 2))


def record(path, name, what, against, **result):
    """Write one row; it replaces that of the same name, description and device.

    Args:
      path: JSON file of rows, or None: do nothing.
      name, what, against: see docs/benchmarks.md.
      result: fields of the result, for example those of `compared` and `limited`.
    """
    if path is None:
        return
    path = pathlib.Path(path)
    row = dict(name=name, what=what, against=against, **result, source="measured", device=device())
    row.update(software=software(), commit=make_tables.commit(), command=shlex.join(["python", *relative(sys.argv)]))
    rows = json.loads(path.read_text()) if path.exists() else []
    key = ("name", "what", "device")
    places = [i for i, other in enumerate(rows) if all(other.get(field) == row[field] for field in key)]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)
    make_tables.write_rows(path, rows)
    print(f"{path}: {name} {'replaced' if places else 'appended'}")


def device():
    """Cores and processor of this machine."""
    model = cpuinfo.field("model name") or platform.machine()
    flags = cpuinfo.field("flags").split()
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    matrices = "AMX" if "amx_tile" in flags else ""
    cores = len(os.sched_getaffinity(0))
    return ", ".join(filter(None, [f"{cores} core{'s' * (cores > 1)} of {model}", vectors, matrices]))


def software():
    peers = (package for module, package in PEERS.items() if module in sys.modules)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (*PACKAGES, *peers))
    return f"Python {platform.python_version()}, {versions}"


def relative(argv):
    """The words of a command, with its program relative to this repository, without --record and paths elsewhere."""
    words = [os.path.relpath(argv[0], ROOT), *argv[1:]]
    words = [("FOLDER" if os.path.isdir(word) else "FILE") if os.path.isabs(word) else word for word in words]
    if "--record" in words:
        at = words.index("--record")
        del words[at : at + 2]
    return [word for word in words if not word.startswith("--record=")]
