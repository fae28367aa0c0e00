"""tools/check_data.py: every kind of finding, resuming an interrupted check; --exclude in training and evaluation."""

import os
import pathlib
import shutil
import struct
import sys
import zlib

import check_data
import numpy as np
import pytest
import torch
from PIL import Image
from support import LAUNCH_TINY, ROOT, user_error
from tiny import PROGRAM, SPEC

from common.data import audit, decode, exclude, index
from common.errors import UserError
from common.evaluation import program

TOOL = ROOT / "tools" / "check_data.py"


@pytest.fixture
def data(images, tmp_path, monkeypatch):
    """A copy of the data set for the test to damage, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, tmp_path / "data")
    return tmp_path / "data"


def png_bomb(path, width, height):
    """A PNG of a few bytes whose header has width x height pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[:400])


def checked(*argv):
    """(exit status, entries {path: reason}, comments {path: reason}) of a check in this process."""
    sys.argv = ["check_data.py", *map(str, argv), "--workers=1"]
    status, entries, comments = check_data.main(), {}, {}
    for line in pathlib.Path("exclude.txt").read_text().splitlines()[1:]:
        path, reason = line.removeprefix("# ").split("\t")
        (comments if line.startswith("# ") else entries)[path] = reason
    return status, entries, comments


@pytest.mark.parametrize("side", [9460, 30_000, 2**31 - 1])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, side):
    png_bomb(tmp_path / "bomb.png", side, side)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    with pytest.raises(decode.GiantImage) as error:
        decode.open_rgb(tmp_path / "bomb.png")
    assert "at most 89,478,485 are decoded" in str(error.value) and str(tmp_path / "bomb.png") in str(error.value)


def test_an_image_of_the_largest_size_is_decoded(tmp_path, monkeypatch):
    Image.new("L", (30, 20)).save(tmp_path / "x.png")
    monkeypatch.setattr(decode, "MAX_PIXELS", 600)
    assert decode.open_rgb(tmp_path / "x.png").size == (30, 20)
    monkeypatch.setattr(decode, "MAX_PIXELS", 599)
    with pytest.raises(decode.GiantImage, match="30 x 20 pixels"):
        decode.open_rgb(tmp_path / "x.png")


def test_postscript_in_an_image_file_is_not_run(tmp_path):
    """PIL would hand it to Ghostscript, whatever the file is called."""
    path = tmp_path / "script.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(decode.BadImage, match="cannot identify"):
        decode.open_rgb(path)


def test_a_bomb_costs_no_memory(run, tmp_path):
    png_bomb(tmp_path / "bomb.png", 13_000, 13_000)  # 507 MB as RGB
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); from common.data import audit, decode\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert audit.examine(sys.argv[2]).kind == 'giant'\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    assert int(run(sys.executable, "-c", program, ROOT, tmp_path / "bomb.png").stdout) < 20_000  # KiB


def test_every_kind_of_finding(run, data):
    train, val = data / "train", data / "val"
    (train / "ant" / "0000.jpg").write_bytes(b"")
    truncate(train / "ant" / "0001.jpg")
    truncate(val / "ant" / "0001.jpg")
    (train / "ant" / "0002.jpg").write_text("no image")
    png_bomb(train / "ant" / "0003.png", 20_000, 20_000)
    os.mkfifo(train / "ant" / "pipe.jpg")
    (train / "ant" / "nowhere.jpg").symlink_to("missing.jpg")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(train / "bee" / "png.JPEG", "PNG", exif=exif)
    shutil.copy(train / "bee" / "0000.jpg", train / "bee" / "copy of it.jpg")
    shutil.copy(train / "bee" / "0001.jpg", train / "cat" / "other.jpg")
    shutil.copy(val / "cat" / "0002.jpg", train / "cat" / "leaked.jpg")
    shutil.copy(val / "cat" / "0003.jpg", val / "cat" / "twice.jpg")
    (train / "readme.txt").write_text("x")
    (val / "eel").mkdir()
    shutil.copy(val / "cat" / "0004.jpg", val / "eel" / "x.jpg")
    (train / "dog").mkdir()
    done = run(TOOL, data, "--workers=2", check=1, cwd=data.parent)
    lines = (data.parent / "exclude.txt").read_text().splitlines()
    entries = dict(line.split("\t") for line in lines if not line.startswith("#"))
    comments = [line for line in lines[1:] if line.startswith("#")]
    assert {path: reason.partition(":")[0] for path, reason in entries.items()} == {
        "train/ant/0000.jpg": "zero-byte",
        "train/ant/0001.jpg": "broken",
        "val/ant/0001.jpg": "broken",
        "train/ant/0002.jpg": "broken",
        "train/ant/0003.png": "giant",
        "train/ant/pipe.jpg": "broken",
        "train/ant/nowhere.jpg": "broken",
        "train/bee/copy of it.jpg": "duplicate",
        "train/bee/0001.jpg": "contradiction",
        "train/cat/other.jpg": "contradiction",
        "train/cat/leaked.jpg": "overlap",
    }
    assert entries["train/cat/leaked.jpg"] == "overlap: is in validation too: val/cat/0002.jpg"
    assert entries["train/ant/pipe.jpg"] == "broken: is no regular file"
    assert sorted(comments) == [
        "# train/bee/png.JPEG\tmisnamed: holds a PNG",
        "# train/bee/png.JPEG\tturned: EXIF says to turn it, which is ignored; tools/split_data.py turns it",
        "# train/dog\tempty class: holds no image that decodes",
        "# train/dog\tuntested class: val/ has no such class",
        "# train/readme.txt\tignored: is not taken for an image of a class",
        "# val/cat/twice.jpg\tduplicate: equals val/cat/0003.jpg",
        "# val/eel\tunknown class: train/ has no such class",
        "# val/eel/x.jpg\tduplicate: equals val/cat/0004.jpg",
    ]
    assert "train: 61 images that decode in 4 classes of 0 to 22, median 19.5" in done.stdout
    assert "broken: 5\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "15 findings, 4 notes" and done.stderr == ""


def test_a_clean_dataset_gives_an_empty_list_and_notes_do_not_count(data):
    assert checked(data) == (0, {}, {})
    (data / "train" / "notes.txt").write_text("x")
    assert checked(data)[0] == 0


def test_copies_that_systems_leave_behind_are_ignored_and_unread_images_are_found(data):
    (data / "train" / ".ipynb_checkpoints").mkdir()
    (data / "train" / "ant" / "@eaDir").mkdir()
    for folder in ("train/.ipynb_checkpoints", "train/ant/@eaDir"):
        for path in (data / "train" / "ant").glob("*.jpg"):
            shutil.copy(path, data / folder)
    shutil.copy(data / "train" / "ant" / "0000.jpg", data / "train" / "ant" / "._0000.jpg")
    reason = "ignored: is hidden, or made by a system; never a class or an image"
    notes = {"train/.ipynb_checkpoints/": reason, "train/ant/@eaDir/": reason, "train/ant/._0000.jpg": reason}
    assert checked(data) == (0, {}, notes)
    (data / "val" / "ant" / "x.heic").write_bytes(b"x")
    status, entries, comments = checked(data)
    assert status == 1 and not entries
    assert comments["val/ant/x.heic"] == "unread: is a .heic image, which is not read; convert it to JPEG or PNG"


def test_of_equal_files_with_one_label_one_stays(data):
    for number in range(20):  # every image of the class twice
        shutil.copy(data / "train" / "ant" / f"{number:04d}.jpg", data / "train" / "ant" / f"copy {number}.jpg")
    status, entries, comments = checked(data)
    assert status == 1 and not comments
    assert entries == {f"train/ant/copy {k}.jpg": f"duplicate: equals train/ant/{k:04d}.jpg" for k in range(20)}
    left = index.load_splits(str(data), excluded=exclude.read("exclude.txt")).train
    assert left.labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20


@pytest.mark.parametrize("name", ["a\tb.jpg", "a\nb.jpg", "a\rb.jpg"])
def test_a_name_that_a_list_cannot_hold_is_a_finding_without_an_entry(data, name):
    assert not exclude.can_hold(f"train/ant/{name}") and not exclude.can_hold("a.jpg ")
    (data / "train" / "ant" / name).touch()
    (data / "train" / f"{name}.txt").touch()  # a comment of the list
    status, entries, comments = checked(data)
    assert status == 1 and not entries
    (reason,) = (reason for path, reason in comments.items() if path == ascii(f"train/ant/{name}"))
    assert reason == "zero-byte: is empty; --exclude cannot name this file, rename or remove it"


def test_a_list_that_empties_a_class_is_found_and_refused(data):
    shutil.copytree(data / "train" / "ant", data / "train" / "ant copy")  # every image in two classes
    status, entries, comments = checked(data)
    assert status == 1 and len(entries) == 40
    reason = "emptied class: the list leaves out all 20 images; take lines out of it, or remove the folder"
    assert (
        comments["train/ant"] == reason and f"# train/ant copy\t{reason}\n" in pathlib.Path("exclude.txt").read_text()
    )
    with pytest.raises(UserError) as error:
        index.load_splits(str(data), excluded=exclude.read("exclude.txt"))
    assert str(error.value).startswith("--exclude: it names all 20 images of class ant and 1 more in ")
    checked(data / "train")
    with pytest.raises(UserError, match="--exclude: it names all 20 images of class ant and 1 more in "):
        train = index.load_folder(data / "train")
        index.apply_exclude_list(train, exclude.read("exclude.txt"), is_dataset_root=True)


def test_classes_of_very_different_size(data):
    for number in range(2, 20):
        (data / "train" / "bee" / f"{number:04d}.jpg").unlink()
    truncate(data / "train" / "bee" / "0001.jpg")  # an image that does not decode is none
    assert checked(data, "--max-imbalance=20")[1].keys() == {"train/bee/0001.jpg"}
    status, _, comments = checked(data, "--max-imbalance=19.5")
    assert status == 1
    assert comments == {"train/bee": "imbalance: 1 images; the largest class, ant, has 20, median 20"}


def test_the_flat_layout(data):
    (data / "flat").mkdir()
    lines = []
    for label, name in enumerate(("ant", "bee", "cat")):
        shutil.copy(data / "val" / name / "0000.jpg", data / "flat" / f"{name}.jpg")
        lines.append(f"{name}.jpg {label}")
    shutil.rmtree(data / "val")
    (data / "flat").rename(data / "val")
    (data / "val_label.txt").write_text("\n".join(lines))
    assert checked(data) == (0, {}, {})
    shutil.copy(data / "train" / "ant" / "0000.jpg", data / "val" / "new.jpg")
    truncate(data / "val" / "cat.jpg")
    (data / "val_label.txt").write_text("\n".join([*lines, "bee.jpg 1", "gone.jpg 0", "cat.jpg dog", "newer 3"]))
    status, entries, comments = checked(data)
    assert status == 1 and entries.keys() == {"train/ant/0000.jpg", "val/cat.jpg"}
    assert comments["val/new.jpg"] == "unlabelled: is not in val_label.txt"
    written = pathlib.Path("exclude.txt").read_text()
    for mistake in (
        "line 4: bee.jpg again with label 1 (line 2: 1); every image counts once",
        "line 5: val/ has no image gone.jpg",
        "line 6: 'cat.jpg dog', must be NAME INDEX",
        "line 7: label 3, the classes are 0..2",
    ):
        assert f"# val_label.txt\tlabel: {mistake}" in written
    (data / "val_label.txt").write_text("\n")
    status, _, comments = checked(data)
    assert status == 1 and comments["val_label.txt"] == "label: no labels; expected a line NAME INDEX per image"


def test_a_folder_of_class_folders(data):
    truncate(data / "train" / "ant" / "0001.jpg")
    assert checked(data / "train")[1].keys() == {"ant/0001.jpg"}


def test_a_single_class_is_a_finding(data):
    for part in ("train", "val"):
        (data / part / "all").mkdir()
        for folder in sorted((data / part).iterdir()):
            if folder.name != "all":
                folder.rename(data / part / "all" / folder.name)
    status, _, comments = checked(data / "train")
    reason = "one class: holds one class folder, all; a classifier needs two. "
    assert status == 1 and comments["."].startswith(reason)
    assert checked(data)[2]["train"].startswith(reason)
    with pytest.raises(UserError, match="--data: .*/train holds one class folder, all; a classifier needs two"):
        PROGRAM.prepare(*PROGRAM.parse(["--data", str(data)]))


@pytest.fixture
def looked_at(monkeypatch):
    """Names of the files that were decoded."""
    names = []
    monkeypatch.setattr(
        decode, "open_rgb", lambda path, *rest, real=decode.open_rgb: names.append(path) or real(path, *rest)
    )
    return names


def test_an_interrupted_check_resumes_and_the_next_reads_changes_only(data, monkeypatch, looked_at):
    real, left = audit.examine, [70]

    def until_interrupted(*args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(audit, "examine", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        checked(data)
    before = len(looked_at)
    assert 0 < before < 70 and not os.path.exists("exclude.txt")
    monkeypatch.setattr(audit, "examine", real)
    assert checked(data)[0] == 0
    # 81 files; those of the unfinished task of the interrupted run are looked at again.
    assert 81 <= len(looked_at) <= 81 + 32 and len(set(looked_at)) == 81 and len(looked_at) < 2 * 81
    looked_at.clear()
    assert checked(data)[0] == 0 and looked_at == []
    truncate(data / "train" / "bee" / "0007.jpg")
    (data / "train" / "bee" / "0008.jpg").unlink()
    shutil.copy(data / "train" / "bee" / "0009.jpg", data / "val" / "bee" / "new.jpg")
    assert checked(data)[1].keys() == {"train/bee/0007.jpg", "train/bee/0009.jpg"}
    assert sorted(os.path.basename(path) for path in looked_at) == ["0007.jpg", "new.jpg"]


def test_damaged_results_are_computed_again(data):
    checked(data)
    (stored,) = (data.parent / "cache" / "image-zoo").glob("*.check")
    stored.write_bytes(b"not a database" * 1000)
    assert checked(data) == (0, {}, {})


def test_two_checks_of_one_dataset_at_a_time_are_refused(data):
    store = audit.Store(data)
    with pytest.raises(UserError, match="another check of .* is running"):
        audit.Store(data)
    store.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing"], "DIR: missing is not a folder"),
        (["data/train/ant"], "ant holds no class folders; give the folder that holds train/ and val/"),
        (["data", "--list=other.txt"], "--list: other.txt exists and is no list of this program"),
        (["data", "--list=data"], "--list: data is a folder; name a file"),
        (["data", "--max-imbalance=0.5"], "--max-imbalance: 0.5, must be at least 1"),
    ],
)
def test_wrong_usage(data, argv, message, monkeypatch, capsys):
    (data.parent / "other.txt").write_text("precious")
    monkeypatch.setattr(sys, "argv", ["check_data.py", *argv])
    with pytest.raises(UserError) as error:
        check_data.main()
    assert message in str(error.value) and (data.parent / "other.txt").read_text() == "precious"


def test_wrong_usage_ends_with_status_2(run):
    assert user_error(run(TOOL, "missing", check=2)) == "DIR: missing is not a folder"


# ---- --exclude ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_list(data):
    """A list of two training images and one of validation, which are broken."""
    names = ["train/cat/0004.jpg", "train/ant/0000.jpg", "val/bee/0002.jpg"]
    for name in names:
        truncate(data / name)
    path = data.parent / "bad list.txt"
    path.write_text("# a comment\n\n" + "\n".join(f"{name}\tbroken: for a test" for name in names) + "\n")
    return path


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_from_a_windows_editor_is_read(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes("train/ant/0000.jpg\r\n".encode(encoding))
    assert exclude.read(str(tmp_path / "list.txt")) == {"train/ant/0000.jpg"}
    (tmp_path / "list.txt").write_bytes("train/ant/0000.jpg".encode("utf-16-le"))
    with pytest.raises(UserError, match="--exclude: .* cannot be read .it holds zero bytes, as UTF-16 without"):
        exclude.read(str(tmp_path / "list.txt"))


def test_excluded_images_are_as_if_they_were_not_there(data, bad_list):
    listed = index.load_splits(str(data), excluded=exclude.read(bad_list))
    assert (len(listed.train), listed.train.excluded, len(listed.val), listed.val.excluded) == (58, 2, 20, 1)
    for name in ("train/cat/0004.jpg", "train/ant/0000.jpg", "val/bee/0002.jpg"):
        (data / name).unlink()
    removed = index.load_splits(str(data))
    assert list(listed.train.names()) == list(removed.train.names())
    assert listed.train.fingerprint == removed.train.fingerprint and listed.val.fingerprint == removed.val.fingerprint


def test_paths_may_be_relative_to_the_only_folder_that_was_named(data):
    train = index.load_folder(data / "train")
    for name in ("ant/0000.jpg", "./ant/0000.jpg", "train/ant/0000.jpg"):
        assert index.apply_exclude_list(train, frozenset([os.path.normpath(name)]), is_dataset_root=True).excluded == 1
    assert index.apply_exclude_list(train, frozenset(["ant/0000.jpg"])).excluded == 0


def test_training_leaves_out_the_list_through_the_launcher_on_two_ranks(run, data, bad_list):
    done = run(
        *LAUNCH_TINY,
        f"--data_path={data}",
        "--device=cpu",
        "--devices=2",
        "--batch_size=12",
        "--",
        "--epochs=1",
        f"--exclude={bad_list}",
    )
    assert "58 images in 3 classes, 20 for validation, 3 left out by --exclude" in done.stdout


def test_a_resumed_run_needs_the_same_list(data, bad_list):
    common = ["--data", str(data), "--output-dir", "run", "--epochs=1"]
    PROGRAM.main([*common, "--exclude", str(bad_list)])
    resume = ["--data", str(data), "--resume=run/checkpoint.pth.tar", "--epochs=2"]
    assert len(PROGRAM.prepare(*PROGRAM.parse([*resume, "--exclude", str(bad_list)])).splits.train) == 58
    longer = data.parent / "longer.txt"
    longer.write_text(bad_list.read_text() + "train/cat/0005.jpg\n")
    with pytest.raises(UserError) as error:
        PROGRAM.prepare(*PROGRAM.parse([*resume, "--exclude", str(longer)]))
    assert str(error.value).startswith(f"--exclude: {longer} leaves 57 images, but the checkpoint ")
    assert f"was trained on 58 of this folder (--exclude {bad_list}); give the same list" in str(error.value)
    with pytest.raises(UserError, match="^--exclude: no list leaves 60 images"):
        PROGRAM.prepare(*PROGRAM.parse(resume))
    (data / "train" / "cat" / "0006.jpg").unlink()
    with pytest.raises(UserError, match="^--data: train/ does not hold the images that"):
        PROGRAM.prepare(*PROGRAM.parse([*resume, "--exclude", str(bad_list)]))


@pytest.mark.parametrize("folder", ["", "val"])
def test_evaluation_leaves_out_the_list_and_says_how_many(data, bad_list, capsys, folder):
    torch.save(
        dict(
            arch="tiny",
            state_dict=SPEC.build(num_classes=3).state_dict(),
            build=dict(num_classes=3),
            image_size=32,
            classes=["ant", "bee", "cat"],
        ),
        "w.pth.tar",
    )
    config = program.EvalConfig(
        data=str(data / folder), resume="w.pth.tar", device="cpu", workers=0, exclude=str(bad_list)
    )
    counts, _ = program.evaluate_folder(SPEC, config)
    assert counts.seen == 20 and "(1 left out by --exclude)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "--exclude: list.txt cannot be read (No such file or directory)"),
        ("/data/train/x.jpg", "--exclude: line 1 of list.txt is /data/train/x.jpg; paths are relative to"),
        ("#\ntrain/../x.jpg", "--exclude: line 2 of list.txt is train/../x.jpg; paths are relative to"),
        ("ant/0000.jpg", "--exclude: none of its 1 images is here, the first is ant/0000.jpg; paths are relative"),
        (
            "\n".join(f"val/{name}/{i:04d}.jpg" for name in ("ant", "bee", "cat") for i in range(7)),
            "--exclude: it names all 21 images of",
        ),
    ],
)
def test_lists_that_are_refused(data, lines, message):
    if lines is not None:
        (data.parent / "list.txt").write_text(lines)
    with pytest.raises(UserError) as error:
        PROGRAM.prepare(*PROGRAM.parse(["--data", str(data), "--exclude=list.txt"]))
    assert str(error.value).startswith(message)
