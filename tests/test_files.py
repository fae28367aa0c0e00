"""common/files.py: a file is replaced whole or not at all, and no draft stays behind."""

import errno
import multiprocessing
import os
import pathlib
import re
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from support import LAUNCH_TINY, ROOT, SIZE, TINY, user_error, write_pooling_onnx

from common import files
from common.errors import UserError


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
        files.write_atomic(tmp_path / "x", "new", suffix=".tmp")
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


# ---- two at once -----------------------------------------------------------------------------------------------------


def at_once(function, number, *args):
    """Exit statuses of `function` in processes that start together."""
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(number)
    started = [context.Process(target=lambda: (gate.wait(), function(*args))) for _ in range(number)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def test_of_processes_that_write_one_file_at_once_each_writes_a_whole_one(tmp_path):
    def write():
        for _ in range(200):
            files.write_atomic(tmp_path / "x", str(os.getpid()).ljust(5000, "."))

    assert at_once(write, 4) == [0, 0, 0, 0]
    assert len((tmp_path / "x").read_text()) == 5000 and names(tmp_path) == ["x"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_one_process_at_a_time_has_a_claim(tmp_path, is_folder):
    place, inside = tmp_path / "place", tmp_path / "inside"
    if is_folder:
        place.mkdir()

    def take_turns():
        taken = 0
        while taken < 15:
            try:
                with files.claimed(place, "--out"):
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    os.unlink(inside)
                    taken += 1
            except UserError:
                time.sleep(0.0002)

    assert at_once(take_turns, 4) == [0, 0, 0, 0]
    assert names(tmp_path) == ["place"] * is_folder and (not is_folder or names(place) == [])


def test_a_claim_on_a_file_that_its_owner_has_just_removed_is_made_again(tmp_path, monkeypatch):
    calls = []

    def lock_of_removed(file, lock=files.lock):
        calls.append(file)
        if len(calls) == 1:
            os.unlink(file.name)
        return lock(file)

    monkeypatch.setattr(files, "lock", lock_of_removed)
    with files.claimed(tmp_path / "x", "--out"):
        assert names(tmp_path) == ["x.lock"] and len(calls) == 2
        with pytest.raises(UserError):
            files.claimed(tmp_path / "x", "--out").__enter__()


def test_a_claim_ends_with_its_process_and_not_with_its_children(tmp_path):
    started, children = multiprocessing.get_context("fork").Queue(), []

    def claim():
        with files.claimed(tmp_path / "x", "--out"):
            child = subprocess.Popen(["sleep", "60"])
            grandchild = os.fork() or time.sleep(60)
            started.put((child.pid, grandchild))
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=claim)
    process.start()
    children = started.get(timeout=20)
    with pytest.raises(UserError, match=f"^--out: {tmp_path}/x is being written by another program; wait for its end"):
        files.claimed(tmp_path / "x", "--out").__enter__()
    process.kill()
    process.join()
    assert names(tmp_path) == ["x.lock"]
    with files.claimed(tmp_path / "x", "--out"):
        pass
    assert names(tmp_path) == []
    for child in children:
        os.kill(child, 9)


@pytest.mark.parametrize("path", [files.atomic_path, files.atomic_folder])
def test_a_full_disk_names_the_file_that_was_asked_for(path, tmp_path, monkeypatch):
    """OSError of write() has no file, that of open() the draft; the full disk may be that of standard output."""
    full = SimpleNamespace(f_bavail=0, f_frsize=4096)
    for has_name, free, expected in ((False, full, "x"), (True, os.statvfs("/dev/shm"), "x"), (False, None, None)):
        if free:
            monkeypatch.setattr(files.os, "statvfs", lambda _, free=free: free)
        else:
            monkeypatch.undo()
        with pytest.raises(OSError) as caught, path(tmp_path / "x") as draft:
            raise OSError(errno.ENOSPC, "No space left", *[str(draft)] * has_name)
        assert caught.value.filename == (expected and str(tmp_path / expected)) and names(tmp_path) == []


def test_the_folder_of_a_file_is_created(tmp_path):
    with files.claimed_file(tmp_path / "new" / "x", "--out"):
        assert names(tmp_path / "new") == ["x.lock"]
    assert names(tmp_path / "new") == []
    with pytest.raises(KeyError), files.claimed_file(tmp_path / "other" / "folder" / "x", "--out"):
        raise KeyError
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^--out: .*file"), files.claimed_file(tmp_path / "file" / "x", "--out"):
        pass
    assert names(tmp_path) == ["file", "new"]


def test_without_locks_or_a_place_for_the_file_the_block_runs(tmp_path, monkeypatch):
    with files.claimed(tmp_path / "new" / "x", "--out"):
        assert names(tmp_path) == []

    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with files.claimed(tmp_path, "--out"):
        assert names(tmp_path) == [".lock"] and files.is_empty(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("flag", "place", "words"),
    [
        ("--save-path", "out/", ["inception_v3/preprocess.py", "--src_path=DATA/val/ant", "--save_path=out"]),
        ("--output-dirname", "all/out/", ["tools/run_onnx.py", "--model=ONNX", "--output=all", "--output_dirname=out"]),
        ("--onnx", "out.onnx", ["inception_v3/pthtar2onnx.py", "--ckpt=x", "--onnx=out.onnx"]),
        ("OUT", "out.onnx", ["tools/quantize.py", "x.onnx", "out.onnx", "--data=x"]),
        ("OUT", "out.pth", ["tools/convert_weights.py", "x.pth", "out.pth"]),
        ("OUT", "out/", ["tools/convert_weights.py", "x.pth", "out", "--to=hub"]),
        ("--out", "out.html", ["tools/report.py", "x", "--out=out.html"]),
        ("--json", "out.json", ["tools/compare.py", "x", "y", "--data=x", "--json=out.json"]),
        ("--output", "out/", ["tools/study.py", "--data=x", "--recipes=scratch", "--output=out"]),
        ("--list", "out.txt", ["tools/check_data.py", "DATA", "--list=out.txt"]),
        ("OUT", "out/", ["tools/pack_data.py", "DATA", "out"]),
        ("OUT", "out/shard-1-of-2", ["tools/pack_data.py", "DATA", "out", "--shard=1/2"]),
        ("OUT", "out/train/train-000000.tar", ["tools/pack_data.py", "DATA", "out", "--shard=2/2"]),
        ("DIR", "out/", ["tools/make_sample_data.py", "out"]),
        ("OUT", "out/", ["tools/split_data.py", "TRAIN", "out"]),
        ("--predictions", "out.csv", ["inception_v3/demo.py", "IMAGE", "--resume=ONNX", "--predictions=out.csv"]),
    ],
)
def test_a_program_whose_output_another_one_writes_says_so(run, images, tmp_path, flag, place, words):
    target = tmp_path / place
    (target if place.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
    if place.endswith(".tar"):
        run(ROOT / "tools" / "pack_data.py", images, "out", "--shard=2/2")
        for left in (tmp_path / "out" / "train").glob("*0.*"):
            left.unlink()
        words = [word.replace("2/2", "1/2") for word in words]
    write_pooling_onnx(tmp_path / "net.onnx", shape=(1, 3, SIZE, SIZE))
    before = names(target.parent)
    replaced = {
        "DATA": images,
        "TRAIN": images / "train",
        "ONNX": tmp_path / "net.onnx",
        "IMAGE": images / "val" / "ant" / "0000.jpg",
    }
    for name, path in replaced.items():
        words = [word.replace(name, str(path)) for word in words]
    with files.claimed(target, flag):
        done = run(ROOT / words[0], *words[1:], check=2)
    assert re.fullmatch(
        f"{flag}: .*{place.rstrip('/')} is being written by another program; wait for its end, or name another place",
        user_error(done),
    )
    assert names(target.parent) == before
    if target.suffix and target.suffix != ".tar":
        target.mkdir()
        message = user_error(run(ROOT / words[0], *words[1:], check=2))
        assert message == f"{flag}: {place} is a folder; name a file"


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
