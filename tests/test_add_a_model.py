"""docs/ADD_A_MODEL.md works as written: in a copy of the repository its files pass every stage."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

from support import ROOT

GUIDE = ROOT / "docs" / "ADD_A_MODEL.md"
_FILE = re.compile(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_a_fourth_model_passes_every_stage(tmp_path):
    for folder in ("common", "tools", "inception_v4"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = GUIDE.read_text()
    for name, content in _FILE.findall(text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    script = "\n".join(_COMMANDS.findall(text))
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "resumed at epoch 1 step 2" in done.stdout and "Final Train Accuracy" in done.stdout
    assert "Number of images" in (tmp_path / "onnx.json").read_text()
