"""common/files.py: a file is replaced whole or not at all, and no draft stays behind."""

import os
import pathlib
import stat
import subprocess
import sys

import numpy as np
import pytest
from support import LAUNCH_TINY, ROOT, TINY, user_error

from common import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_bytes_and_arrays_are_written_one_after_the_other(tmp_path):
    numbers = np.arange(6, dtype=np.uint16).reshape(2, 3)
    files.write_atomic(tmp_path / "x", "ä\n", b"", b"ab", memoryview(numbers), memoryview(np.zeros(0)))
    assert (tmp_path / "x").read_bytes() == "ä\nab".encode() + numbers.tobytes() and names(tmp_path) == ["x"]


def test_mode_and_modification_time_are_those_asked_for(tmp_path):
    files.write_atomic(tmp_path / "x", b"1", mode=0o640, mtime_ns=1_600_000_000_000_001_000)
    status = (tmp_path / "x").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o640, 1_600_000_000_000_001_000)


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "x").write_text("old")
    with files.atomic_path(tmp_path / "x", ".tmp.onnx") as draft:
        draft.write_text("new")
        assert (draft.parent, draft.name) == (tmp_path, "x.tmp.onnx") and (tmp_path / "x").read_text() == "old"
    assert (tmp_path / "x").read_text() == "new" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_draft(tmp_path, error):
    (tmp_path / "x").write_text("old")
    with pytest.raises(error), files.atomic_path(tmp_path / "x") as draft:
        draft.write_text("half")
        raise error
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_a_full_disk_leaves_the_old_file_and_no_draft(tmp_path):
    (tmp_path / "x").write_text("old")
    (tmp_path / "x.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        files.write_atomic(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_a_write_that_stops_short_goes_on(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: write(descriptor, view[:2]))
    files.write_atomic(tmp_path / "x", "abcde")
    assert (tmp_path / "x").read_text() == "abcde"


def test_a_draft_that_is_a_link_to_the_target_is_removed(tmp_path):
    """os.replace does nothing where both names are links to one file."""
    (tmp_path / "x").write_text("same")
    with files.atomic_path(tmp_path / "x") as draft:
        os.link(tmp_path / "x", draft)
    assert names(tmp_path) == ["x"]


@pytest.fixture
def read_only(tmp_path):
    """Words that run a program in a folder that takes no files, root's neither."""
    (tmp_path / "here").mkdir()
    mount = f"mount --bind {tmp_path}/here {tmp_path}/here && mount -o remount,ro,bind {tmp_path}/here"
    enter = f'{mount} && cd {tmp_path}/here && exec "$@"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", enter, "sh"]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return words


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--output-dir", [TINY]),
        ("--output-dir", [TINY, "--output-dir=."]),
        ("--output-dir", [*LAUNCH_TINY, "--device=cpu", "--batch_size=12", "--devices=2", "--max_restarts=1"]),
        ("--metrics-json", [ROOT / "inception_v4" / "postprocess.py", "--infer_results=x", "--anno_file=y"]),
        ("--metrics-json", [ROOT / "inception_v4" / "eval.py", "--data=x", "--resume=y", "--metrics-json=z"]),
        ("--log-file", [ROOT / "xception" / "eval.py", "--dataset-path=x", "--checkpoint-path=y"]),
        ("--onnx", [ROOT / "inception_v3" / "pthtar2onnx.py", "--ckpt=x"]),
        ("DIR", [ROOT / "tools" / "make_sample_data.py", "samples"]),
        ("--folder", [ROOT / "tools" / "quickstart.py"]),
        ("--save-path", [ROOT / "inception_v3" / "preprocess.py", "--save_path=inputs"]),
        ("--list", [ROOT / "tools" / "check_data.py", "DATA"]),
    ],
)
def test_a_program_in_a_folder_that_cannot_be_written_says_what_to_give(run, images, read_only, tmp_path, flag, words):
    data = {"tiny": f"--data={images}", "launch": f"--data_path={images}", "preprocess": f"--src_path={images}/val/ant"}
    words = [images if word == "DATA" else word for word in words]
    words += [data[name] for name in [pathlib.Path(words[0]).stem] if name in data]
    assert user_error(run(*read_only, sys.executable, *words, check=2)).startswith(f"{flag}: ")


def test_any_other_file_that_cannot_be_written_is_one_line(run, read_only):
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    program = f"{path}\nfrom common import cli\nwith cli.exit_on_error(): open('x', 'w')"
    done = run(*read_only, sys.executable, "-c", program, check=2)
    assert user_error(done) == "x: Read-only file system; name another file or folder, or change this one"
