"""The index of a dataset: torchvision's order, two layouts, a cache that notices changes."""

import os
import shutil
import stat
import sys

import pytest
import torchvision
from support import ROOT

from common.data import file_tree, index
from common.errors import UserError
from common.evaluation import predict


def test_images_classes_and_order_are_image_folders(images):
    ours, peer = index.load_folder(images / "train"), torchvision.datasets.ImageFolder(images / "train")
    assert list(ours.classes) == peer.classes
    assert [(ours.path(i), int(ours.labels[i])) for i in range(len(ours))] == peer.samples


def test_nested_folders_and_foreign_files(tmp_path, images):
    shutil.copytree(images / "train", tmp_path / "train")
    for name in ("0010a/x", "0010a", "0010a-b", "0010"):  # "0010a-b" sorts between "0010a" and "0010a/x"
        (tmp_path / "train" / "bee" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "train" / "bee" / "0000.jpg", tmp_path / "train" / "bee" / name / "IMG.JPEG")
    (tmp_path / "train" / "ant" / "readme.gif").write_bytes(b"")
    ours, peer = index.load_folder(tmp_path / "train"), torchvision.datasets.ImageFolder(tmp_path / "train")
    assert [os.path.normpath(ours.path(i)) for i in range(len(ours))] == [path for path, _ in peer.samples]
    assert ours.ignored == 1


# What macOS, Windows, Synology and QNAP systems, Jupyter and Python leave beside images.
LEFT_BEHIND = (
    "train/.ipynb_checkpoints/0000-checkpoint.jpg",
    "train/ant/.ipynb_checkpoints/0000-checkpoint.jpg",
    "train/ant/@eaDir/0000.jpg/SYNOPHOTO_THUMB_M.jpg",
    "train/__MACOSX/ant/._0000.jpg",
    "train/ant/._0000.jpg",
    "train/ant/.0000.jpg.swp.jpg",
    "train/ant/Thumbs.db",
    "train/ant/desktop.ini",
    "train/#recycle/old.jpg",
    "train/@Recycle/old.jpg",
    "train/$RECYCLE.BIN/old.jpg",
    "train/lost+found/old.jpg",
    "train/bee/__pycache__/x.jpg",
    "train/.DS_Store",
)


def leave_behind(data):
    """Copies of an image under every name of LEFT_BEHIND."""
    for name in LEFT_BEHIND:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "train" / "ant" / "0000.jpg", data / name)


def test_what_systems_leave_behind_is_neither_class_nor_image(tmp_path, images):
    shutil.copytree(images, tmp_path / "data")
    before = index.load_folder(tmp_path / "data" / "train")
    leave_behind(tmp_path / "data")
    after = index.load_folder(tmp_path / "data" / "train")
    assert after.classes == ("ant", "bee", "cat") and after.fingerprint == before.fingerprint
    assert after.ignored == len(LEFT_BEHIND) and before.ignored == 0  # a hidden folder counts once
    assert after.ignored_kinds == {"hidden": len(LEFT_BEHIND)} and before.ignored_kinds == {}
    assert index.load_folder(tmp_path / "data" / "train").ignored_kinds == after.ignored_kinds  # from the cache


def test_the_demo_finds_the_images_that_training_finds(tmp_path, images, capsys):
    shutil.copytree(images, tmp_path / "data")
    leave_behind(tmp_path / "data")
    root = tmp_path / "data" / "train"
    assert predict.list_images(str(root)) == [str(root / name) for name in sorted(index.load_folder(root).names())]
    assert capsys.readouterr().out == f"note: ignored in {root}: {len(LEFT_BEHIND)} hidden\n"
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "IMG_1.HEIC").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"holds no images \(.*\) but 1 .heic, which are not read; convert them to JPEG"
    ):
        predict.list_images(str(tmp_path / "phone"))


def test_images_that_are_not_read_are_named_and_jfif_is_a_jpeg(tmp_path, images):
    shutil.copytree(images / "train", tmp_path / "train")
    for name in ("a.heic", "b.HEIC", "c.avif", "d.txt"):
        (tmp_path / "train" / "ant" / name).write_bytes(b"x")
    shutil.copy(tmp_path / "train" / "bee" / "0000.jpg", tmp_path / "train" / "ant" / "e.jfif")
    found = index.load_folder(tmp_path / "train")
    assert len(found) == 61 and "ant/e.jfif" in list(found.names())
    assert found.ignored == 4 and file_tree.describe_ignored(found.ignored_kinds) == (
        "1 .avif, 2 .heic, which are not read; convert them to JPEG or PNG"
    )
    for path in (tmp_path / "train" / "ant").glob("*.j*"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no images \(.*\) but 1 .avif, 2 .heic, which are not read; convert"):
        index.load_folder(tmp_path / "train")


def test_a_cached_index_of_other_rules_is_built_again(root, walks, monkeypatch):
    index.load_folder(root)
    monkeypatch.setattr(index, "_RULES", index._RULES + 1)
    index.load_folder(root)
    index.load_folder(root)
    assert len(walks) == 2


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("forms", [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_unicode_forms_of_a_class_name_are_one_class(tmp_path, images, forms):
    shutil.copytree(images, tmp_path / "data")
    for split, name in zip(("train", "val"), forms, strict=True):
        (tmp_path / "data" / split / "bee").rename(tmp_path / "data" / split / name)
    splits = index.load_splits(str(tmp_path / "data"))
    assert splits.val.classes == splits.train.classes == ("ant", forms[0], "cat")
    assert splits.val.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    listed = frozenset([f"val/{forms[0]}/0000.jpg"])  # a list that was written on the other system
    assert index.apply_exclude_list(splits.val, listed).excluded == 1
    (tmp_path / "data" / "train" / forms[1]).mkdir()
    with pytest.raises(UserError, match="holds two class folders .*, in Unicode's composed and decomposed form; merge"):
        index.load_splits(str(tmp_path / "data"))


def test_a_class_that_train_has_in_another_spelling_is_named(tmp_path, images):
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "val" / "bee").rename(tmp_path / "data" / "val" / "Bee ")
    with pytest.raises(
        UserError, match=r"val/ has class folders that train/ lacks: Bee  \(train/ has bee\); move, rename"
    ):
        index.load_splits(str(tmp_path / "data"))


def aged(root):
    """Make the folders of a tree old enough for their stamps to be trusted; returns the tree."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1_600_000_000, 1_600_000_000))
    return root


@pytest.fixture
def walks(monkeypatch):
    """The walks that were done, one entry each."""
    done = []
    monkeypatch.setattr(index, "_walk", lambda *args, real=index._walk: done.append(args) or real(*args))
    return done


@pytest.fixture
def root(tmp_path, images, monkeypatch):
    """A copy of the training split for the test to change, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(images / "train", tmp_path / "train")
    (tmp_path / "train" / "cat" / "deep" / "er").mkdir(parents=True)
    shutil.copy(tmp_path / "train" / "cat" / "0000.jpg", tmp_path / "train" / "cat" / "deep" / "er")
    return aged(tmp_path / "train")


def test_a_second_start_does_not_walk_and_equals_the_first(root, walks):
    first, second = index.load_folder(root), index.load_folder(root)
    assert len(walks) == 1 and second.fingerprint == first.fingerprint and second.classes == first.classes
    assert list(second.names()) == [second.name(i) for i in range(len(second))] == list(first.names())
    assert second.labels.tolist() == first.labels.tolist()


@pytest.mark.parametrize("folder", ["cat", "cat/deep", "cat/deep/er"])
def test_an_added_and_a_removed_file_are_noticed_at_any_depth(root, walks, folder):
    first = index.load_folder(root)
    shutil.copy(root / "cat" / "0004.jpg", root / folder / "new.jpg")
    more = index.load_folder(root)
    assert len(more) == len(first) + 1 and more.fingerprint != first.fingerprint and len(walks) == 2
    (root / folder / "new.jpg").unlink()
    assert index.load_folder(root).fingerprint == first.fingerprint


def test_an_added_and_a_removed_class_are_noticed(root):
    first = index.load_folder(root)
    shutil.copytree(root / "ant", root / "dog")
    assert len(index.load_folder(root).classes) == 4
    shutil.rmtree(root / "dog")
    assert index.load_folder(root).fingerprint == first.fingerprint


def test_a_file_added_in_the_same_tick_of_the_clock_is_noticed(root, walks):
    stamp = (root / "ant").stat().st_mtime_ns
    os.utime(root / "ant")  # the folder changes now, and the index is built at once
    now = (root / "ant").stat().st_mtime_ns
    first = index.load_folder(root)
    shutil.copy(root / "cat" / "0004.jpg", root / "ant" / "new.jpg")
    os.utime(root / "ant", ns=(now, now))  # as if the file system's clock had not moved on
    assert len(index.load_folder(root)) == len(first) + 1 and now != stamp


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"[]\n",
        lambda content: content[:-3] + b"x" + content[-2:],
    ],
)
def test_a_damaged_cache_is_built_again(root, walks, tmp_path, damage):
    first = index.load_folder(root)
    (cache,) = (tmp_path / "cache" / "image-zoo").iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    again = index.load_folder(root)
    assert len(walks) == 2 and list(again.names()) == list(first.names()) and again.fingerprint == first.fingerprint


def test_without_a_home_the_index_is_kept_among_temporary_files(root, walks, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert index.load_folder(root).fingerprint == index.load_folder(root).fingerprint and len(walks) == 1
    assert stat.S_IMODE((tmp_path / f"image-zoo-{os.getuid()}").stat().st_mode) == 0o700


def test_a_link_to_a_folder_above_is_named(root):
    (root / "cat" / "loop").symlink_to(root / "cat")
    with pytest.raises(UserError) as error:
        index.load_folder(root)
    assert str(error.value) == f"{root}/cat/loop: links to a folder above it; remove the link"


COUNTS_WALKS = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from common.data import index
from tiny import PROGRAM
def walk(root, flag, real=index._walk):
    with open("walks.txt", "a") as file:
        file.write(os.environ["RANK"] + " " + os.path.basename(root) + chr(10))
    return real(root, flag)
index._walk = walk
PROGRAM.main()
"""


def test_one_rank_walks_for_all_of_its_machine(run, tmp_path, root, images):
    shutil.copytree(images / "val", tmp_path / "val")
    aged(tmp_path / "val")
    aged(root)
    (tmp_path / "counts.py").write_text(COUNTS_WALKS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run(*torchrun, "counts.py", "--data", tmp_path, "--max-steps=1")
    assert (tmp_path / "walks.txt").read_text() == "0 train\n0 val\n"
    missing = run(*torchrun, "counts.py", "--data", tmp_path / "train", check=1).stderr
    assert missing.count("error: --data: ") == 1 and "has no train/ folder" in missing


def test_labels_of_val_count_in_trains_classes(tmp_path, images):
    shutil.copytree(images, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "ant")
    splits = index.load_splits(str(tmp_path / "data"))
    assert sorted(set(splits.val.labels.tolist())) == [1, 2]


def test_the_flat_layout(tmp_path, images):
    shutil.copytree(images / "train", tmp_path / "train")
    (tmp_path / "val").mkdir()
    for label, name in enumerate(("ant", "bee", "cat")):
        shutil.copy(images / "val" / name / "0000.jpg", tmp_path / "val" / f"x {label}.JPEG")
    (tmp_path / "val" / "readme.txt").write_text("")
    (tmp_path / "val_label.txt").write_text("x 2.JPEG 2\nx 1.JPEG 1\nx 0.JPEG 0\n\n")
    val = index.load_splits(str(tmp_path)).val
    assert [val.name(i) for i in range(len(val))] == ["x 2.JPEG", "x 1.JPEG", "x 0.JPEG"]
    assert val.labels.tolist() == [2, 1, 0] and val.ignored == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "val_label.txt: no labels; expected a line NAME INDEX per image"),
        ("x 0.JPEG zero", "val_label.txt, line 1: 'x 0.JPEG zero', must be NAME INDEX"),
        ("missing.JPEG 0", "the first is missing.JPEG"),
        ("x 0.JPEG 3", "label 3, the classes are 0..2"),
        ("x 0.JPEG 1\nx 0.JPEG 1", "line 2: x 0.JPEG again with label 1 (line 1: 1); every image counts once"),
    ],
)
def test_mistakes_in_a_label_file_are_named(tmp_path, images, line, message):
    (tmp_path / "val").mkdir()
    shutil.copy(images / "val" / "ant" / "0000.jpg", tmp_path / "val" / "x 0.JPEG")
    (tmp_path / "val_label.txt").write_text(line + "\n")
    with pytest.raises(UserError) as error:
        index.load_val(str(tmp_path), ("ant", "bee", "cat"))
    assert message in str(error.value)


def test_images_without_a_label_are_not_left_out_silently(tmp_path, images):
    (tmp_path / "val").mkdir()
    for k in range(7):
        shutil.copy(images / "val" / "ant" / f"{k:04d}.jpg", tmp_path / "val")
    shutil.copy(images / "val" / "ant" / "0000.jpg", tmp_path / "val" / "._0000.jpg")  # hidden: needs no label
    lines = [f"{k:04d}.jpg 0" for k in range(7)]
    (tmp_path / "val_label.txt").write_text("\n".join(lines))
    assert len(index.load_val(str(tmp_path), ("ant",))) == 7
    (tmp_path / "val_label.txt").write_text("\n".join(lines[:3]))
    with pytest.raises(UserError) as error:
        index.load_val(str(tmp_path), ("ant",))
    assert "val_label.txt has labels for 3 of the 7 images in " in str(error.value)
    assert "and none for 0003.jpg, 0004.jpg, 0005.jpg ...; add them, or move these images" in str(error.value)


def test_an_empty_split_is_not_taken_for_none(images):
    """An empty index is false as a condition."""
    splits = index.load_splits(str(images))
    empty = index.Splits(splits.train, splits.val.without(set(splits.val.names())))
    assert len(empty.val) == 0 and f" and 0 images ({empty.val.fingerprint})" in empty.summary
    with pytest.raises(UserError, match="--exclude: it names all 0 images"):
        empty.without(frozenset(["val/ant/0000.jpg"]))
