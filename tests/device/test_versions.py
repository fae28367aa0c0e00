"""versions.json against its sources, and what is said of versions that do not go together."""

import re

import pytest
from support import ROOT

from common.device import cann, diagnosis, versions


@pytest.mark.parametrize(
    ("version", "torch", "cann", "is_beta"),
    [
        ("2.7.1.post4", "2.7.1", "9.0", False),
        ("2.7.1.post5", "2.7.1", "9.1", True),
        ("2.8.0.post4", "2.8.0", "9.0", False),
        ("2.9.0", "2.9.0", "8.5", False),
        ("2.9.0.post2", "2.9.0", "9.0", False),
        ("2.9.0.post3", "2.9.0", "9.1", True),
        ("2.9.0.post6", "2.9.0", "9.1", False),
        ("2.10.0", "2.10.0", "9.0", False),
        ("2.11.0", "2.11.0", "9.1", False),
        ("2.12.0", "2.12.0", "9.1", False),
        ("2.12.0+git123", "2.12.0", "9.1", False),
        ("2.8.0", "2.8.0", "8.3", False),
    ],
)
def test_pairs_of_the_compatibility_page(version, torch, cann, is_beta):
    found = versions.torch_npu(version)
    assert (found.torch, found.cann, found.is_beta) == (torch, cann, is_beta)
    assert cann in found.works_with and versions.cann(cann) is not None


def test_versions_that_the_table_lacks():
    assert versions.torch_npu("2.9.0.post33") is None and versions.torch_npu(None) is None
    assert versions.cann("10.0.0") is None and versions.cann(None) is None


@pytest.mark.parametrize(
    ("text", "series"),
    [("8.3.RC1", "8.3"), ("9.1.0-beta.1", "9.1"), ("9.0.0.beta2", "9.0"), ("8.5.0", "8.5"), ("6.0.1", "6.0")],
)
def test_series_of_cann(text, series):
    assert versions.cann(text).cann == series


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("package_name=Ascend-cann-toolkit\nversion=8.3.RC1\ninnerversion=V100R001C23\n", "8.3.RC1"),
        ("# version: 1.0\nruntime_running_version=[1.84.15.1.310:6.0.1]\n", "6.0.1"),
        ("Version=25.2.0\nascendhal_version=7.35.23\n", "25.2.0"),
        ("nothing\n", None),
    ],
)
def test_version_files_of_cann_and_of_the_driver(tmp_path, text, version):
    (tmp_path / "file").write_text(text)
    assert cann.read_version(tmp_path / "file") == version


@pytest.mark.parametrize(
    ("cann", "python", "takes_python", "takes_numpy_2"),
    [
        ("8.3", (3, 11), True, False),
        ("8.3", (3, 12), False, False),
        ("8.5", (3, 12), True, False),
        ("8.5", (3, 13), True, True),
        ("8.5", (3, 14), False, True),
        ("9.0", (3, 12), True, True),
        ("9.0", (3, 14), False, True),
        ("9.1", (3, 14), True, True),
    ],
)
def test_python_and_numpy_of_cann(cann, python, takes_python, takes_numpy_2):
    entry = versions.cann(cann)
    assert entry.takes_python(python) == takes_python
    assert entry.takes_numpy("2.4.6", python) == takes_numpy_2
    assert entry.takes_numpy("1.26.4", python)


def test_opsets_of_atc():
    assert {each.cann: each.opsets for each in versions.canns()} == {
        **dict.fromkeys(("9.1", "9.0", "8.5"), (11, 18)),
        **dict.fromkeys(("8.3", "8.2", "8.1", "8.0", "7.0"), (9, 18)),
        **dict.fromkeys(("6.0", "5.0"), (9, 13)),
    }


def test_supported_versions_are_those_of_the_requirements():
    pins = (ROOT / "requirements-npu.txt").read_text()
    first, *others = versions.supported()
    assert f"torch_npu=={first.version}\n" in pins and f"torch=={first.torch}+cpu\n" in pins
    low, high = re.search(r"^torch>=([\d.]+),<([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE).groups()
    assert versions.numbers(low) == versions.MIN_TORCH
    assert all(
        versions.numbers(low) <= versions.numbers(each.torch) < versions.numbers(high) for each in [first, *others]
    )
    assert versions.describe([first, *others]) == (
        "torch 2.12.0 with torch_npu 2.12.0 and CANN 9.1, torch 2.11.0 with torch_npu 2.11.0 and CANN 9.1"
    )
    assert versions.supported("8.5") == [first, *others] and versions.supported("8.3") == []


@pytest.mark.parametrize(
    ("torch_npu", "cann", "says"),
    [
        ("2.12.0", "9.1.0", None),
        ("2.12.0", "8.5.0", None),  # compatible, though built for another
        (
            "2.12.0",
            "8.3.RC1",
            "torch_npu 2.12.0 was built for CANN 9.1 and works with 9.1, 9.0, 8.5; install one of these",
        ),
        ("2.9.0.post2", "8.0.0", "torch_npu 2.9.0.post2 was built for CANN 9.0 and works with 9.1, 9.0, 8.5, 8.3"),
        ("2.9.0", "8.0.0", None),
        ("2.8.0", "9.0.0", "torch_npu 2.8.0 was built for CANN 8.3 and works with 8.3"),
        ("2.8.0.post4", "9.0.0", None),
        ("2.99.0", "9.1.0", None),
        ("2.12.0", "10.0.0", None),
    ],
)
def test_cann_against_the_post_number_of_torch_npu(monkeypatch, torch_npu, cann, says):
    monkeypatch.setattr(diagnosis, "_version_of", lambda package: torch_npu)
    found = diagnosis.cann_mismatch(cann)
    assert found is None if says is None else found.startswith(says)
