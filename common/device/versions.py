"""Which torch_npu, torch, CANN, Python, NumPy and ONNX opsets go together: versions.json, with its sources."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

PATH = pathlib.Path(__file__).with_name("versions.json")
MIN_TORCH = (2, 11)  # of this project, as in requirements.txt


@dataclasses.dataclass(frozen=True)
class TorchNpu:
    """A version of torch_npu.

    Attributes:
      version: with its .postN, which alone says for which CANN it was built.
      product: Huawei's number of the release; a beta has "-beta" in it.
      cann: series of CANN that it was built for, "9.1".
      works_with: series that Huawei declares compatible, newest first.
    """

    version: str
    product: str
    cann: str
    works_with: tuple[str, ...]

    @property
    def torch(self) -> str:
        return self.version.partition(".post")[0]

    @property
    def is_beta(self) -> bool:
        return "-" in self.product


@dataclasses.dataclass(frozen=True)
class Cann:
    """A series of CANN.

    Attributes:
      python: first and last version, or None where unknown.
      numpy: versions that its installation guide names.
      numpy_2_from_python: Python from which on NumPy 2 is allowed, or None.
      opsets: first and last that its atc parses.
    """

    cann: str
    python: tuple[str, str] | None
    numpy: str | None
    numpy_2_from_python: str | None
    opsets: tuple[int, int]

    def takes_python(self, version: Sequence[int]) -> bool:
        """Whether Python (major, minor) is within its range; also if that is unknown."""
        return self.python is None or numbers(self.python[0]) <= tuple(version) <= numbers(self.python[1])

    def takes_numpy(self, numpy: str, python: Sequence[int]) -> bool:
        """Whether its operator compiler takes this NumPy under Python (major, minor): NumPy 2 removed names."""
        if self.numpy is None or numbers(numpy)[0] < 2:
            return True
        return self.numpy_2_from_python is not None and tuple(python) >= numbers(self.numpy_2_from_python)


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(PATH.read_text())


@functools.cache
def releases() -> tuple[TorchNpu, ...]:
    """All versions of torch_npu in the table, newest product first."""
    return tuple(
        TorchNpu(version, row["product"], row["cann"], tuple(row["works_with"]))
        for row in _table()["releases"]
        for version in row["torch_npu"]
    )


@functools.cache
def canns() -> tuple[Cann, ...]:
    """All series of CANN in the table, newest first."""
    return tuple(
        Cann(**{**row, "python": row["python"] and tuple(row["python"]), "opsets": tuple(row["opsets"])})
        for row in _table()["cann"]
    )


def numbers(version: str) -> tuple[int, ...]:
    """2.10.0.post4 -> (2, 10, 0, 4); without the local part."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def torch_npu(version: str | None) -> TorchNpu | None:
    """The entry of a version of torch_npu, or None if the table lacks it."""
    public = (version or "").partition("+")[0]
    return next((each for each in releases() if each.version == public), None)


def cann(version: str | None) -> Cann | None:
    """The entry of a version of CANN such as 8.3.RC1 or 9.1.0-beta.1, or None if the table lacks its series."""
    series = ".".join(map(str, numbers(version or "")[:2]))
    return next((each for each in canns() if each.cann == series), None)


def torch_python(torch: str) -> tuple[str, str] | None:
    """First and last Python of a release of torch."""
    found = _table()["torch_python"].get(torch)
    return found and (found[0], found[1])


def python_of_cann() -> str:
    """ "CANN 9.1 takes Python up to 3.14, 9.0 and 8.5 up to 3.13, ..." """
    series = dict[str, list[str]]()
    for each in canns():
        if each.python and numbers(each.python[1]) >= (3, 11):
            series.setdefault(each.python[1], []).append(each.cann)
    parts = [f"{', '.join(names)} up to {python}" for python, names in series.items()]
    return f"CANN {parts[0].replace(' up to', ' takes Python up to')}, {', '.join(parts[1:])}"


def supported(cann_series: str | None = None) -> list[TorchNpu]:
    """One release of torch_npu for each torch that this project takes, newest torch first.

    It is that of the product which Huawei recommends, else the newest.

    Args:
      cann_series: only those that work with this CANN.
    """
    recommended = _table()["recommended"]
    chosen = dict[str, TorchNpu]()
    for each in sorted(releases(), key=lambda each: each.product != recommended):
        if numbers(each.torch)[:2] >= MIN_TORCH and (cann_series or each.cann) in each.works_with:
            chosen.setdefault(each.torch, each)
    return sorted(chosen.values(), key=lambda each: numbers(each.torch), reverse=True)


def describe(pairs: Sequence[TorchNpu]) -> str:
    """ "torch 2.12.0 with torch_npu 2.12.0 and CANN 9.1, ..." """
    return ", ".join(f"torch {each.torch} with torch_npu {each.version} and CANN {each.cann}" for each in pairs)
