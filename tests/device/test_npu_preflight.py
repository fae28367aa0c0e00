"""common/device/npu_preflight.py on a machine with simulated CANN, driver and npu-smi."""

import os
import socket
import sys

import pytest
from support import ROOT

from common.device import npu_preflight

CARD = "| {number}     {name}               | {health:13} | 94.6        36                0    / 0             |\n"


@pytest.fixture
def ascend(tmp_path, monkeypatch):
    """ascend(cards, cann file, ...) makes a machine with CANN, driver and npu-smi; the device is not simulated."""

    def make(
        cards, version_file="x86_64-linux/ascend_toolkit_install.info", version="9.1.0", operators=("ascend910b",)
    ):
        (tmp_path / "info.txt").write_text(
            "".join(CARD.format(number=n, name=name, health=health) for n, (name, health) in enumerate(cards))
        )
        (tmp_path / "bin").mkdir()
        script = tmp_path / "bin" / "npu-smi"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/fake_bin/npu_smi.py" "$@"\n')
        script.chmod(0o755)
        info = tmp_path / "cann" / version_file
        info.parent.mkdir(parents=True)
        info.write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100\n")
        for chip in operators:
            path = tmp_path / f"cann/opp/built-in/op_impl/ai_core/tbe/config/{chip}/aic-{chip}-ops-info.json"
            path.parent.mkdir(parents=True)
            path.touch()
        (tmp_path / "driver").mkdir()
        (tmp_path / "driver" / "version.info").write_text("Version=25.2.0\nascendhal_version=7.35.23\n")
        for name, value in (
            ("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}"),
            ("FAKE_NPU_SMI", tmp_path),
            ("ASCEND_HOME_PATH", tmp_path / "cann"),
            ("ASCEND_INSTALL_PATH", tmp_path),
        ):
            monkeypatch.setenv(name, str(value))

    return make


def rows(devices, several=False):
    return {each.check: each for each in npu_preflight.run_checks("npu", devices, several)}


@pytest.mark.parametrize(
    "version_file", ["x86_64-linux/ascend_toolkit_install.info", "ascend_nnae_install.info", "version.cfg"]
)
def test_versions_of_every_layout_are_read(ascend, tmp_path, version_file):
    ascend([("910B3", "OK")] * 8, version_file)
    found = rows(8)
    assert found["CANN"].found == f"9.1.0 in {tmp_path}/cann" and found["driver"].found == "25.2.0"
    assert found["chips"].found == "8 (910B3)" and not any(found[need].remedy for need in ("CANN", "driver", "chips"))


@pytest.mark.parametrize(
    ("cards", "devices", "text"),
    [
        ([("910B3", "OK"), ("910B3", "Alarm")], 2, "2 (910B3), unhealthy: 1 (Alarm)"),
        ([("310P3", "OK")], 2, "1 (310P3), 2 wanted"),
        ([], 1, "0 (none), 1 wanted"),
    ],
)
def test_cards_that_are_unhealthy_or_missing(ascend, cards, devices, text):
    ascend(cards)
    found = rows(devices)["chips"]
    assert found.found == text and found.remedy


def test_versions_of_cann_and_of_what_runs_on_it(ascend, monkeypatch):
    monkeypatch.setattr(npu_preflight.sys, "version_info", (3, 13, 1))
    installed = {"torch_npu": "2.12.0", "torch": "2.12.0+cpu", "numpy": "2.4.6"}
    monkeypatch.setattr(npu_preflight.importlib.metadata, "version", installed.__getitem__)
    ascend([("910B3", "OK")], version="8.3.RC1", operators=())
    found = rows(1)
    assert found["torch_npu"].found == "2.12.0, built for CANN 9.1" and not found["torch_npu"].remedy
    assert found["CANN"].remedy.startswith("torch_npu 2.12.0 was built for CANN 9.1 and works with 9.1, 9.0, 8.5;")
    assert found["Python for CANN"].found == "3.13, CANN 8.3 takes 3.7 to 3.11" and found["Python for CANN"].remedy
    assert found["NumPy for CANN"].found.startswith("2.4.6, the operator compiler of CANN 8.3 takes 1.19.2 to 1.24")
    assert found["NumPy for CANN"].remedy == "`pip install 'numpy<2'`"
    assert found["operators"].found.startswith("none in ") and "Ascend-cann-910b-ops" in found["operators"].remedy


def test_versions_that_go_together_are_no_finding(ascend, monkeypatch):
    monkeypatch.setattr(npu_preflight.sys, "version_info", (3, 14, 0))
    installed = {"torch_npu": "2.9.0.post3", "torch": "2.9.0", "numpy": "2.4.6"}
    monkeypatch.setattr(npu_preflight.importlib.metadata, "version", installed.__getitem__)
    ascend([("910B3", "OK")])
    found = rows(1)
    assert found["torch_npu"].found == "2.9.0.post3, built for CANN 9.1 (beta)"
    assert found["operators"].found == "ascend910b"
    assert not {"Python for CANN", "NumPy for CANN"} & found.keys()
    assert not any(found[need].remedy for need in ("torch_npu", "CANN", "operators"))
    installed["torch_npu"] = "2.99.0"
    installed["torch"] = "2.99.0"
    assert "2.99.0, which the table of tested pairs (docs/ASCEND.md) lacks" in rows(1)["torch_npu"].found
    installed["torch"] = "2.12.0"
    assert rows(1)["torch_npu"].found == "torch_npu 2.99.0 needs torch 2.99.0, but this is torch 2.12.0"
    assert "torch_npu 2.12.0 and CANN 9.1" in rows(1)["torch_npu"].remedy


def test_health_that_is_not_reported_and_a_device_in_use(ascend, tmp_path):
    ascend([("910B3", "NA"), ("910B3", "--")])
    chips = rows(2)["chips"]
    assert chips.found == "2 (910B3), health not reported: 0, 1" and not chips.remedy
    (tmp_path / "info.txt").write_text("dcmi model initialized failed, because the device is used. ret is -8020")
    chips = rows(2)["chips"]
    assert chips.found.endswith("ret is -8020") and "/usr/local/dcmi" in chips.remedy


def test_a_card_with_a_warning_will_do(ascend):
    ascend([("910B3", "Warning")])
    assert not rows(1)["chips"].remedy


@pytest.mark.parametrize(
    ("text", "devices", "right"),
    [
        ("0,1,5", 3, True),
        ("3", 1, True),
        ("0,1", 3, False),
        ("1,0", 2, False),
        ("0, 1", 2, False),
        ("", 1, False),
    ],
)
def test_the_list_of_visible_devices(monkeypatch, text, devices, right):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", text)
    assert bool(rows(devices)["visible devices"].remedy) != right


def test_hccl_ports(monkeypatch):
    assert "HCCL ports" not in rows(1)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("HCCL_IF_BASE_PORT", str(port - 3))
        row = rows(2, several=True)["HCCL ports"]
        assert f"{port} (Address already in use)" in row.found
        assert f"ip_local_reserved_ports={port - 3}-{port + 12} " in row.remedy
    monkeypatch.setenv("HCCL_IF_BASE_PORT", "70000")
    assert rows(2, several=True)["HCCL ports"].remedy == "give 1024 to 65519"
