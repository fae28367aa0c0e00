"""common/environment.py: programs in locales that cannot express the names of files and classes."""

import os
import subprocess
import sys

import pytest
import torch
from support import ROOT, TINY, draw_images

from common import environment

PROGRAM = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom common import cli\nwith cli.exit_on_error():\n    "

ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": ""}


def test_in_an_ascii_locale_a_program_starts_again_in_utf8_once(run, tmp_path):
    body = "import pathlib; pathlib.Path('猫').write_text('蚂蚁'); print('猫', *sys.argv[1:], sys.flags.utf8_mode)"
    (tmp_path / "program.py").write_text(PROGRAM + body, encoding="utf-8")
    done = run("bash", "-c", '"$0" program.py 蜜蜂', sys.executable, env=ASCII)
    assert done.stdout == "猫 蜜蜂 1\n" and (tmp_path / "猫").read_bytes() == "蚂蚁".encode()
    done = run("bash", "-c", '"$0" -X utf8=0 program.py 蜜蜂', sys.executable, env=ASCII, check=1)
    assert "UnicodeEncodeError" in done.stderr, "an interpreter that insists on ASCII is left alone"


@pytest.mark.parametrize(("encoding", "printed"), [("utf-8", b"\xe7\x8c\xab\xff\n"), ("latin-1", b"\\u732b\\udcff\n")])
def test_a_name_that_is_no_text_is_printed_as_well_as_the_terminal_can(tmp_path, encoding, printed):
    (tmp_path / "program.py").write_text(PROGRAM + "print('猫\\udcff')", encoding="utf-8")
    words = [sys.executable, tmp_path / "program.py"]
    done = subprocess.run(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stdout) == (0, printed)


def test_chinese_class_names_are_the_same_in_an_ascii_locale(run, tmp_path):
    """Trained in one and continued in the other, with one cached index."""
    names = ["猫", "蚂蚁", "蜜蜂"]
    draw_images(tmp_path / "数据" / "train", names, 8)
    draw_images(tmp_path / "数据" / "val", names, 1)
    words = ["--data=数据", "--output-dir=训练", "--resume=auto"]
    run(sys.executable, TINY, *words, "--epochs=1", env=ASCII)
    state = torch.load(tmp_path / "训练" / "checkpoint.pth.tar", weights_only=True)
    assert state["classes"] == names
    assert (tmp_path / "训练" / "log.txt").read_text(encoding="utf-8").splitlines()[0].endswith("; 训练")
    done = run(TINY, *words, "--epochs=2")
    assert "resumed at epoch 2" in done.stdout


def test_a_user_without_name_and_home_trains_and_leaves_no_folder_called_tilde(run, images, tmp_path):
    """`docker run --user`: torch asks for the name when it is imported, the cache of file lists for the home."""
    as_nobody = [
        "unshare",
        "--user",
        "--map-user=4242",
        "env",
        "-i",
        f"PATH={os.environ['PATH']}",
        f"TMPDIR={tmp_path}",
    ]
    if subprocess.run([*as_nobody, "true"]).returncode:
        pytest.skip("no user namespaces here")
    (tmp_path / "cwd").mkdir()
    words = [sys.executable, TINY, "--data", images, "--output-dir=run", "--epochs=1", "--workers=1"]
    done = run(*as_nobody, *words, cwd=tmp_path / "cwd")
    assert done.stderr == "" and [path.name for path in (tmp_path / "cwd").iterdir()] == ["run"]
    home = tmp_path / "image-zoo-4242"
    assert home.stat().st_mode & 0o777 == 0o700 and list(home.glob(".cache/image-zoo/*")), "the cache is not used"


def test_a_home_that_another_user_made_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "")
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"image-zoo-{os.getuid()}").symlink_to(tmp_path / "theirs")
    environment.name_user()
    assert os.environ["HOME"] == os.devnull
    for name in ("HOME", "USER"):
        monkeypatch.setenv(name, "own")
    environment.name_user()
    assert (os.environ["HOME"], os.environ["USER"]) == ("own", "own")
