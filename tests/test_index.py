"""The index of a dataset: torchvision's order, two layouts, a cache that notices changes."""

import os
import shutil

import pytest
import torchvision

from common.data import index
from common.errors import UserError


def test_images_classes_and_order_are_image_folders(images):
    ours, peer = index.load_folder(images / "train"), torchvision.datasets.ImageFolder(images / "train")
    assert list(ours.classes) == peer.classes
    assert [(ours.path(i), int(ours.labels[i])) for i in range(len(ours))] == peer.samples


def test_nested_folders_and_foreign_files(tmp_path, images):
    shutil.copytree(images / "train", tmp_path / "train")
    deeper = tmp_path / "train" / "bee" / "0010a" / "x"
    deeper.mkdir(parents=True)
    shutil.copy(tmp_path / "train" / "bee" / "0000.jpg", deeper / "IMG.JPEG")
    (tmp_path / "train" / "ant" / "readme.gif").write_bytes(b"")
    ours, peer = index.load_folder(tmp_path / "train"), torchvision.datasets.ImageFolder(tmp_path / "train")
    assert [os.path.normpath(ours.path(i)) for i in range(len(ours))] == [path for path, _ in peer.samples]
    assert ours.ignored == 1


def test_a_second_start_does_not_walk_and_a_change_is_noticed(tmp_path, images, monkeypatch):
    root = tmp_path / "train"
    shutil.copytree(images / "train", root)
    first = index.load_folder(root)
    walks = []
    monkeypatch.setattr(index, "_walk", lambda *args, real=index._walk: walks.append(1) or real(*args))
    assert index.load_folder(root).fingerprint == first.fingerprint and not walks
    (root / "cat" / "0003.jpg").unlink()
    smaller = index.load_folder(root)
    assert walks == [1] and len(smaller) == len(first) - 1 and smaller.fingerprint != first.fingerprint
    shutil.copy(root / "cat" / "0004.jpg", root / "cat" / "new.jpg")
    assert len(index.load_folder(root)) == len(first)


def test_a_damaged_cache_is_built_again(images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = index.load_folder(images / "train")
    (cache,) = (tmp_path / "image-zoo").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])
    assert index.load_folder(images / "train").fingerprint == first.fingerprint


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
    (tmp_path / "val_label.txt").write_text("x 2.JPEG 2\nx 0.JPEG 0\n\n")
    val = index.load_splits(str(tmp_path)).val
    assert [val.name(i) for i in range(len(val))] == ["x 2.JPEG", "x 0.JPEG"] and val.labels.tolist() == [2, 0]
    assert val.ignored == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x 0.JPEG zero", "line 1 is 'x 0.JPEG zero', must be `NAME INDEX`"),
        ("missing.JPEG 0", "the first is missing.JPEG"),
        ("x 0.JPEG 3", "label 3, the classes are 0..2"),
    ],
)
def test_mistakes_in_a_label_file_are_named(tmp_path, images, line, message):
    (tmp_path / "val").mkdir()
    shutil.copy(images / "val" / "ant" / "0000.jpg", tmp_path / "val" / "x 0.JPEG")
    (tmp_path / "val_label.txt").write_text(line + "\n")
    with pytest.raises(UserError) as error:
        index.load_val(str(tmp_path), ("ant", "bee", "cat"))
    assert message in str(error.value)
