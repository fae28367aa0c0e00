"""tools/split_data.py: which images go where, what is left out, EXIF, folders that cannot be divided."""

import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from support import draw_images, user_error

from common.data import decode, index
from common.errors import UserError
from tools import split_data

CLASSES = ["Ameisen (Große)", "bees & wasps", "cat"]
TURNED = Image.Exif()
TURNED[0x0112] = 6


def divide(*words):
    """Run the program in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["split_data.py", *map(str, words), "--workers=1"])
        split_data.main()


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tmp_path):
    draw_images(tmp_path / "photos", CLASSES, 10)
    return tmp_path / "photos"


def test_each_class_is_divided_and_training_reads_it(photos, tmp_path):
    before = files_of(photos)
    divide(photos, tmp_path / "out", "--val-percent=30")
    found = index.load_splits(str(tmp_path / "out"))
    assert list(found.classes) == CLASSES
    assert np.bincount(found.train.labels).tolist() == [7] * 3 and np.bincount(found.val.labels).tolist() == [3] * 3
    train, val = files_of(tmp_path / "out" / "train"), files_of(tmp_path / "out" / "val")
    assert not train & val and train | val == before == files_of(photos)
    for name in val:
        assert os.path.samefile(photos / name, tmp_path / "out" / "val" / name)  # no second copy of the pixels
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]  # no draft
    assert (tmp_path / "out").stat().st_mode == photos.stat().st_mode


def test_the_choice_is_that_of_the_seed_and_stays_where_photographs_are_added(photos, tmp_path):
    chosen = {}
    for seed in (0, 0, 1):
        divide(photos, tmp_path / "out", f"--seed={seed}")
        names = files_of(tmp_path / "out" / "val")
        assert chosen.setdefault(seed, names) == names
        shutil.rmtree(tmp_path / "out")
    assert chosen[0] != chosen[1]
    shutil.copy(photos / "cat" / "0000.jpg", photos / "cat" / "9.jpg")
    Image.new("RGB", (40, 40), "red").save(photos / "cat" / "9.jpg")
    divide(photos, tmp_path / "out")
    assert len(files_of(tmp_path / "out" / "val") ^ chosen[0]) <= 2  # the new one may take the place of one


def test_what_check_data_would_exclude_is_left_out_and_named(photos, tmp_path, capfd):
    (photos / "cat" / "0001.jpg").write_bytes((photos / "cat" / "0001.jpg").read_bytes()[:400])
    shutil.copy(photos / "cat" / "0002.jpg", photos / "cat" / "0002 copy.jpg")
    shutil.copy(photos / "cat" / "0003.jpg", photos / CLASSES[0] / "other.jpg")
    (photos / "cat" / "IMG_1.HEIC").write_bytes(b"x")
    (photos / "Thumbs.db").write_bytes(b"x")
    shutil.copy(photos / "cat" / "0004.jpg", photos / "loose.jpg")
    divide(photos, tmp_path / "out")
    printed = capfd.readouterr().out
    for kind, number in {"broken": 1, "duplicate": 1, "contradiction": 2, "unread": 1, "ignored": 1}.items():
        assert f"left out, {kind}: {number}\n" in printed
    assert "cat/IMG_1.HEIC: is a .heic image, which is not read; convert it to JPEG or PNG" in printed
    assert "/out: 22 images for training, 6 for validation, in 3 classes. One validation image is 17 %" in printed
    kept = {name.partition("/")[2] for name in files_of(tmp_path / "out")}
    assert files_of(photos) - kept == {
        *(
            "cat/0001.jpg",
            "cat/0002.jpg",
            "cat/0003.jpg",
            f"{CLASSES[0]}/other.jpg",
            "cat/IMG_1.HEIC",
            "Thumbs.db",
            "loose.jpg",
        )
    }


@pytest.mark.parametrize("name", ["x.jpg", "x.JPE", "x.png", "x.webp", "x.tif"])
def test_photographs_are_turned_once(tmp_path, name):
    """TIFF files are turned by PIL, whether asked to or not."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30, 0] = 200  # left half red; turned by 90 degrees it is above
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            image = Image.fromarray(pixels + np.uint8(i + 10 * (label == "b")))
            image.save(
                tmp_path / "photos" / label / f"{i}{name}", Image.registered_extensions()[name[1:].lower()], exif=TURNED
            )
    as_stored = (60, 40) if name == "x.tif" else (40, 60)
    for out, words, shape in (("turned", [], (60, 40)), ("stored", ["--no-upright"], as_stored)):
        divide(tmp_path / "photos", tmp_path / out, *words)
        for path in (tmp_path / out).rglob(f"*{name}"):
            found = np.asarray(decode.open_rgb(path))
            assert found.shape[:2] == shape and not (decode.is_turned(path) and out == "turned")
            half = found[:30] if shape == (60, 40) else found[:, :30]
            assert abs(half[..., 0].mean() - 205) < 12 and half[..., 1].mean() < 20


def test_the_photographs_of_a_folder_stay_together(tmp_path):
    for number in range(4):
        draw_images(tmp_path / "photos" / "ant", [f"nest {number}"], 5, seed=number)
        draw_images(tmp_path / "photos" / "bee", [f"hive {number}"], 5, seed=9 + number)
    divide(tmp_path / "photos", tmp_path / "out", "--group-by=folder", "--val-percent=25")
    for label in ("ant", "bee"):
        folders = {part: {p.name for p in (tmp_path / "out" / part / label).iterdir()} for part in ("train", "val")}
        assert len(folders["val"]) == 1 and len(folders["train"]) == 3 and not folders["val"] & folders["train"]


def test_a_class_keeps_an_image_for_training_and_validation_whatever_the_share():
    config = split_data.SplitConfig(val_percent=1)
    assert len(split_data.validation_names(["a/1", "a/2"], config)) == 1
    config = split_data.SplitConfig(val_percent=90)
    assert len(split_data.validation_names(["a/1", "a/2"], config)) == 1
    grouped = split_data.SplitConfig(val_percent=10, group_by="folder")
    names = [*(f"a/big/{i}" for i in range(9)), *(f"a/small/{i}" for i in range(3))]
    assert split_data.validation_names(names, grouped) == set(names[9:])
    with pytest.raises(UserError, match="DIR: class a has 9 usable images in one folder below it; training and valid"):
        split_data.validation_names(names[:9], grouped)
    with pytest.raises(UserError, match="DIR: class a has 1 usable image; training and validation need one each"):
        split_data.validation_names(["a/1"], config)


def test_mistakes_are_named_and_write_nothing(run, photos, tmp_path):
    tool = pathlib.Path(split_data.__file__)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for part in ("train", "val"):
        shutil.copytree(photos, tmp_path / "divided" / part)
    shutil.copytree(photos, tmp_path / "half" / "train")
    shutil.copytree(photos, tmp_path / "wrapped" / "photos")
    for label in ("a", "b"):
        (tmp_path / "copies" / label).mkdir(parents=True)
        shutil.copy(photos / "cat" / "0000.jpg", tmp_path / "copies" / label / f"{label}.jpg")
    for words, message in (
        (["copies", "out"], "DIR: no image of class a is usable, as listed above; add others, or remove the class"),
        (["none", "out"], "DIR: none is not a folder"),
        ([photos, "full"], "OUT: full exists; name a new folder"),
        ([photos, photos / "new"], "OUT: .*/new is inside of DIR, where it would be a class; name a folder elsewhere"),
        (["divided", "out"], "DIR: divided holds train/ and val/; it is divided already, or rename what is a class"),
        (["half", "out"], "DIR: half holds train/; give half/train, or rename what is a class"),
        ([photos / "cat", "out"], "DIR: .*/cat holds no class folders; expected one folder of images per class"),
        (
            ["wrapped", "out"],
            "DIR: wrapped holds one class folder, photos; a classifier needs two. wrapped/photos holds folders too; "
            "where those are the classes, they belong one level up",
        ),
        ([photos, "out", "--val-percent=0"], "--val-percent: 0.0, must be above 0 and at most 90"),
    ):
        found = user_error(run(tool, *words, check=2))
        assert re.fullmatch(message, found), found
    assert not (tmp_path / "out").exists() and "out." not in str(list(tmp_path.iterdir()))


def test_training_names_the_command_for_a_folder_that_is_not_divided(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "my half" / "train")
    for folder, source in ((photos, str(photos)), (tmp_path / "my half", f"'{tmp_path}/my half/train'")):
        with pytest.raises(UserError) as error:
            index.load_splits(str(folder))
        assert str(error.value).endswith(
            f"; expected train/ and val/. To divide one folder of class folders: python tools/split_data.py {source} "
            "NEW_FOLDER"
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected train/ and val/$"):
        index.load_splits(str(tmp_path / "empty"))
