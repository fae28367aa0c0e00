"""Every bash block of every README runs, in order, from the repository's root as its reader sees it."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from support import ROOT

READMES = sorted(path.relative_to(ROOT) for path in ROOT.glob("**/README.md") if ".venv" not in path.parts)


def blocks(path):
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("readme", [readme for readme in READMES if blocks(readme)], ids=str)
def test_every_bash_block_runs(readme, tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in {line.partition("/")[0] for line in tracked.splitlines()}:  # not what somebody trained there
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks(readme):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


DOCUMENTS = [*READMES, *(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("document", sorted({*DOCUMENTS}), ids=str)
def test_links_to_files_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / document).read_text()):
        if "://" not in target:
            assert (ROOT / document).parent.joinpath(target).exists(), target
