"""tools/make_venv.sh: too small a disk is one line, a failed installation is made anew, a complete one is kept."""

import os
import subprocess

import pytest
from support import ROOT

# As python and as the python of the environment that it makes: notes its arguments, and fails where FAIL says so.
PYTHON = """#!/bin/sh
echo "$*" >> calls
case "$*" in *"$FAIL"*) [ -z "$FAIL" ] || exit 7 ;; esac
case "$*" in
  *"-m venv"*) rm -rf venv && mkdir -p venv/bin && cp "$0" venv/bin/python ;;
  *"cache dir"*) echo "$PWD/cache" ;;
  *"pip install"*) touch "$TMPDIR/wheel" && echo "$TMPDIR" > tmpdir ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "make_venv.sh").write_text((ROOT / "tools" / "make_venv.sh").read_text())
    (tmp_path / "bin").mkdir()

    def start(free_gb=100, fail=""):
        df = f"#!/bin/sh\necho Filesystem\necho disk 1 1 {int(free_gb * 1e9 / 1024)} 1 /\n"
        for name, text in (("df", df), ("python", PYTHON)):
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAIL": fail}
        command = ["bash", tmp_path / "tools" / "make_venv.sh", "python", "venv"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, done.stderr, [call for call in calls if "venv" in call or "install" in call]

    return start


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_too_small_a_disk_is_one_line_and_nothing_is_made(make, tmp_path):
    before = names(tmp_path)
    assert make(free_gb=7.9) == (
        2,
        "error: venv: needs about 8 GB free on its disk (2 of them while pip runs) and has 7; name a folder on "
        "another disk: make VENV=/DISK/venv\n",
        [],
    )
    assert names(tmp_path) == before


@pytest.mark.parametrize("step", ["-m venv", "pip install"])
def test_an_installation_that_failed_is_made_anew_and_a_complete_one_is_kept(make, tmp_path, step):
    status, message, _ = make(fail=step)
    assert status == 7 and not (tmp_path / "venv" / ".installed").exists()
    assert step == "-m venv" or message == "error: venv: pip ended with status 7; 100 GB are free on its disk\n"
    status, _, calls = make()
    assert status == 0 and calls[0] == "-m venv --clear venv" and "install --quiet" in calls[1]
    assert names(tmp_path / "venv") == [".installed", "bin"] and "venv.incomplete" not in names(tmp_path)
    assert (tmp_path / "tmpdir").read_text() == f"{tmp_path}/venv/tmp\n"
    (tmp_path / "venv" / "own").touch()
    assert make(fail="pip install")[0] == 7
    status, _, calls = make(free_gb=3)
    assert status == 0 and len(calls) == 1 and (tmp_path / "venv" / "own").exists()


@pytest.mark.parametrize(("free_gb", "copies"), [(100, True), (10, False)])
def test_pip_keeps_copies_of_wheels_where_there_is_room(make, free_gb, copies):
    _, _, calls = make(free_gb=free_gb)
    assert ("--no-cache-dir" in calls[-1]) is not copies
