"""What run_atc.py says of the installed CANN and of its Python before atc fails of it."""

import json
import sys

import numpy as np
import pytest
from support import SIZE, fails, run_script, write_pooling_onnx

from common.deploy import atc_checks
from common.device import versions

ALL = ("ascend310p", "ascend910b")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(cann, chips, answer of python3): CANN's files, and a python3 that answers so."""

    def make(cann="9.1.0", chips=ALL, python=((3, 11), "1.26.4", [])):
        info = tmp_path / "cann" / "x86_64-linux" / "ascend_toolkit_install.info"
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(f"package_name=Ascend-cann-toolkit\nversion={cann}\n")
        for chip in chips:
            folder = tmp_path / "cann/opp/built-in/op_impl/ai_core/tbe/config" / chip
            folder.mkdir(parents=True)
            (folder / f"aic-{chip}-ops-info-legacy.json").write_text("{}")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python3").write_text(f"#!/bin/sh\necho '{json.dumps(python)}'\n")
        (tmp_path / "bin" / "python3").chmod(0o755)
        monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
        monkeypatch.delenv("ASCEND_OPP_PATH", raising=False)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    return make


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, []),
        ({"cann": "8.5.0", "chips": ()}, ["operators for no chip, not for Ascend310P3", "Ascend-cann-310p-ops"]),
        ({"cann": "8.5.0", "chips": ("ascend910b",)}, ["operators for ascend910b, not for Ascend310P3"]),
        ({"python": ((3, 11), None, ["numpy", "attr"])}, ["lacks numpy attrs", "-m pip install numpy attrs"]),
        ({"cann": "8.3.RC1", "python": ((3, 12), "1.26.4", [])}, ["is Python 3.12; CANN 8.3 takes 3.7 to 3.11"]),
        ({"cann": "9.0.0", "python": ((3, 14), "2.4.6", [])}, ["is Python 3.14; CANN 9.0 takes 3.7 to 3.13"]),
        ({"cann": "8.5.0", "python": ((3, 11), "2.4.6", [])}, ["has NumPy 2.4.6; CANN 8.5", "pip install 'numpy<2'"]),
        ({"cann": "8.5.0", "python": ((3, 13), "2.4.6", [])}, []),
        ({"cann": "9.0.0", "python": ((3, 11), "2.4.6", [])}, []),
        ({"cann": "99.0", "python": ((3, 20), "3.0", [])}, []),
    ],
)
def test_problems_of_the_installed_cann(machine, state, words):
    machine(**state)
    found = atc_checks.environment_problems("Ascend310P3")
    assert len(found) == bool(words) and all(word in found[0] for word in words), found


def test_the_real_python_is_asked(monkeypatch, tmp_path):
    (tmp_path / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = " ".join(atc_checks._python_problems(versions.cann("8.5")))
    assert f"has NumPy {np.__version__}; CANN 8.5 takes 1.19.2 to 1.26" in found
    monkeypatch.setenv("PATH", "/nowhere")
    assert atc_checks._python_problems(None) == ["python3 is not in PATH, atc needs one"]


@pytest.mark.parametrize(
    ("cann", "opset", "elsewhere", "words"),
    [
        (None, 11, True, ""),
        (None, 13, True, ""),
        (None, 9, True, "9.1 (takes 11 to 18), 9.0 (takes 11 to 18), 8.5 (takes 11 to 18) does not parse"),
        (None, 17, True, "CANN 6.0 (takes 9 to 13), 5.0 (takes 9 to 13) does not parse; --opset 11"),
        ("9.1.0", 17, False, ""),
        ("9.1.0", 17, True, "CANN 6.0 (takes 9 to 13)"),
        ("6.0.1", 17, False, "opset 17, which the atc of CANN 6.0 (takes 9 to 13) does not parse"),
        ("8.3.RC1", 9, False, ""),
    ],
)
def test_opset_that_only_some_cann_parse(machine, monkeypatch, cann, opset, elsewhere, words):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    if cann:
        machine(cann)
    found = atc_checks.opset_problem(opset, elsewhere)
    assert (words in found) if words else found is None


def test_run_atc_warns_in_a_dry_run_and_refuses_what_the_installed_atc_cannot_parse(machine, tmp_path, fake_tools):
    write_pooling_onnx(tmp_path / "net.onnx", opset=17, shape=("N", 3, SIZE, SIZE))
    arguments = ("tools/run_atc.py", "--model", "net.onnx", "--soc-version", "310P3")
    done = run_script(*arguments, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith("warning: --model: net.onnx has opset 17, which the atc of")
    machine("6.0.1", chips=())
    environment = fake_tools | {"ASCEND_HOME_PATH": str(tmp_path / "cann")}
    fails(run_script(*arguments, cwd=tmp_path, env=environment), "--model: net.onnx has opset 17", "CANN 6.0")
    machine_info = tmp_path / "cann" / "x86_64-linux" / "ascend_toolkit_install.info"
    machine_info.write_text("version=9.1.0\n")
    done = run_script(*arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "warning: CANN 9.1.0 has operators for no chip, not for Ascend310P3" in done.stderr
