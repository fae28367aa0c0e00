"""tools/pack_data.py: the same images, labels, order and fingerprint as the folder; resume, parts, damage, encoding."""

import json
import os
import pathlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from support import draw_images, final, run_differences
from tiny import PROGRAM, RECIPE, SPEC

from common.data import audit, augment, decode, index, loader, packed, sampling, transforms
from common.deploy import compare
from common.deploy.sides import Side
from common.errors import UserError
from common.evaluation import engine_choice
from tools import pack_data


def pack(*words):
    """Run the program in this process; returns its status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pack_data.py", *map(str, words), "--workers=1"])
        return pack_data.main()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    draw_images(folder / "train", ["ant", "bee", "fly"], 6, size=48)
    draw_images(folder / "val", ["ant", "bee", "fly"], 2, size=48, seed=1)
    Image.new("RGBA", (90, 60), (9, 99, 199, 128)).save(folder / "train" / "bee" / "wing.x.PNG")
    (folder / "train" / "ant" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def packed_set(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "set"
    assert pack(source, out, "--images-per-file=8") == 0
    return out


def test_a_packed_set_is_the_folder(source, packed_set):
    folder, found = index.load_splits(str(source)), index.load_splits(str(packed_set))
    for cached in (False, True):
        for a, b in ((folder.train, found.train), (folder.val, found.val)):
            assert list(a.names()) == list(b.names()) and a.classes == b.classes and a.ignored == b.ignored
            assert np.array_equal(a.labels, b.labels) and a.fingerprint == b.fingerprint
            assert [a.read(i) for i in range(len(a))] == [b.read(i) for i in range(len(b))]
        assert not cached or isinstance(found.train.places.size_N, np.ndarray)
        os.utime(packed_set / "train", (1_600_000_000, 1_600_000_000))  # the cache does not trust a recent mtime
        found = index.load_splits(str(packed_set))
    names = sorted(path.name for path in (packed_set / "train").glob("*.tar"))
    assert names == [f"train-{i:06d}.tar" for i in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_and_evaluation_read_the_same_batches(source, packed_set, workers):
    def batches(root):
        splits, plan = index.load_splits(str(root)), sampling.StepPlan(20, 2, 5)
        train = loader.TrainLoader(splits.train, augment.TrainTransform(RECIPE), plan, 3, "skip", 0, 1, workers, False)
        val = loader.EvalLoader(splits.val, transforms.eval_transform(SPEC, 40), 4, "fail", 0, 1, workers, False)
        read = [[batch.pixels_NHWC, batch.labels_N, batch.indices_N] for batch in (*train.epoch(1), *val)]
        train.close()
        val.close()
        return read

    for a, b in zip(batches(source), batches(packed_set), strict=True):
        assert all(map(torch.equal, a, b))


@pytest.fixture(scope="module")
def packed_images(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed images") / "set"
    assert pack(images, out, "--images-per-file=16") == 0
    return out


def test_a_training_ends_with_the_same_bits_and_goes_on_with_either_form(images, packed_images, tmp_path):
    """Two epochs of five steps on the folder, and in two parts that are stopped and resumed in the second epoch."""
    words = ["--epochs=2", "--ema=0.9", "--workers=1", "--save-every=3"]
    PROGRAM.main([*words, f"--data={images}", f"--output-dir={tmp_path / 'folder'}"])
    for first, second in ((packed_images, packed_images), (packed_images, images), (images, packed_images)):
        output = tmp_path / f"{first.name} {second.name}"
        PROGRAM.main([*words, f"--data={first}", f"--output-dir={output}", "--max-steps=7"])
        assert final(output)["step"] == 2
        PROGRAM.main([*words, f"--data={second}", f"--output-dir={output}", "--resume=auto"])
        assert not run_differences(tmp_path / "folder", output)


def test_compare_and_the_choice_of_an_engine_take_images_of_a_packed_set(source, packed_set):
    """Readers beside the loader: each decodes the files of the folder, or the same bytes of a tar file."""
    side, found = Side("a", 3, 0), []
    for data in (source, packed_set):
        images, is_labeled = compare._images(compare.CompareConfig(data=str(data)), side, side)
        assert is_labeled and images.labels.tolist() == [0, 0, 1, 1, 2, 2]
        sample = engine_choice._sample(images, transforms.eval_transform(SPEC, 32))
        found.append([*map(np.asarray, compare._decoded(images, range(6))[0]), *sample])
    assert all(map(np.array_equal, *found))


def test_other_programs_read_the_tar_files(source, packed_set):
    """webdataset's layout: KEY.jpg and KEY.cls side by side; timm's _info.json."""
    info = json.loads((packed_set / "_info.json").read_text())["splits"]["train"]
    folder, seen = index.load_folder(source / "train"), {}
    for name, length in zip(info["filenames"], info["shard_lengths"], strict=True):
        with tarfile.open(packed_set / name) as tar:
            members = tar.getmembers()
            assert len(members) == 2 * length
            labels = set()
            for image, label in zip(members[::2], members[1::2], strict=True):
                key, extension = image.name.split(".")
                assert label.name == f"{key}.cls" and extension in ("jpg", "png")
                seen[int(key)] = tar.extractfile(image).read()
                assert int(tar.extractfile(label).read()) == folder.labels[int(key)]
                labels.add(int(folder.labels[int(key)]))
        assert len(labels) > 1  # mixed
    assert info["num_samples"] == len(folder) == 20
    assert [seen[i] for i in range(20)] == [folder.read(i) for i in range(20)]


def test_an_exclude_list_names_images_as_in_the_folder(source, packed_set):
    excluded = frozenset({"train/bee/wing.x.PNG", "train/fly/0003.jpg"})
    folder, found = (index.load_splits(str(root), excluded=excluded).train for root in (source, packed_set))
    assert found.excluded == 2 and found.fingerprint == folder.fingerprint
    assert [found.read(i) for i in range(len(found))] == [folder.read(i) for i in range(len(folder))]
    last = len(found) - 1
    assert found.only([last, 0]).read(0) == folder.read(last) and found.only([last, 0]).name(1) == folder.name(0)


def test_a_file_that_does_not_decode_is_named_as_in_the_folder(packed_set):
    train = index.load_folder(packed_set / "train")
    i = list(train.names()).index("ant/broken.jpg")
    with pytest.raises(decode.BadImage, match="packed.*/set/train/ant/broken.jpg: does not decode"):
        decode.open_rgb(train.path(i), train.read(i))


def test_check_data_finds_the_same(source, packed_set):
    def found(root):
        store = audit.Store(str(root))
        splits = store.list_files()
        for block in store.tasks():
            for tasks in block:
                store.update(audit.examine_many(tasks))
        again = [record for block in store.tasks() for tasks in block for _, record in audit.examine_many(tasks)]
        rows = store.db.execute("SELECT path, part, class, digest, kind, note FROM files ORDER BY path").fetchall()
        store.close()
        assert set(again) <= {None} or any(row[4] == "broken" for row in rows)
        return [(split.name, split.classes) for split in splits], rows

    assert found(source) == found(packed_set)


def test_an_interrupted_run_writes_what_is_missing(source, packed_set, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(packed_set, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    (out / "train" / "train-000001.json").unlink()
    (out / "val" / "val-000000.tar").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"is not complete: 1 of 3 tar files .* first train-000001.tar; run"):
        index.load_splits(str(out))
    assert pack(source, out, "--images-per-file=8") == 0
    assert "1 of 3 tar files written, 2 kept" in capsys.readouterr().out
    changed = {path.name for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns}
    assert changed == {"train-000001.tar", "val-000000.tar"}
    for path in before:
        assert path.read_bytes() == (packed_set / path.relative_to(out)).read_bytes()


def test_a_changed_image_is_packed_again(source, packed_set, tmp_path, capsys):
    """Of equal name and size, under a tar file that was finished before."""
    changed, out = tmp_path / "changed", tmp_path / "out"
    shutil.copytree(source, changed)
    shutil.copytree(packed_set, out)
    path = changed / "train" / "fly" / "0003.jpg"
    path.write_bytes(path.read_bytes()[:-9] + b"changed\xff\xd9")
    assert pack(changed, out, "--images-per-file=8") == 0
    assert "1 of 3 tar files written, 2 kept" in capsys.readouterr().out
    found = index.load_splits(str(out)).train
    row = list(found.names()).index("fly/0003.jpg")
    assert found.read(row) == path.read_bytes()


def test_changed_labels_and_missing_tar_files_are_errors(packed_set, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(packed_set, out)
    path = out / "train" / "train-000000.json"
    listing = json.loads(path.read_text())
    path.write_text(json.dumps(listing | {"labels": listing["labels"][::-1]}))
    with pytest.raises(UserError, match="train was changed: names or labels are not those that were packed"):
        index.load_folder(out / "train")
    assert pack(out, "--verify") == 1
    assert "train was changed: names or labels" in capsys.readouterr().out
    path.write_text(json.dumps(listing))
    index.load_folder(out / "train")
    path.with_suffix(".tar").unlink()
    with pytest.raises(UserError, match="1 of 3 tar files are missing, first train-000000.tar"):
        packed.load(str(out / "train"), "--data")


@pytest.mark.parametrize("content", ["{}", "[]", "null", "{", '{"sha256": 1}'])
def test_a_damaged_list_is_reported_and_written_again(content, source, packed_set, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(packed_set, out)
    path = out / "train" / "train-000001.json"
    path.write_text(content)
    assert pack(out, "--verify") == 1
    assert f"{path.with_suffix('.tar')}: " in capsys.readouterr().out
    assert pack(source, out, "--images-per-file=8") == 0
    assert path.read_bytes() == (packed_set / "train" / path.name).read_bytes()
    (out / "train" / packed.MANIFEST).write_text('{"format": 1, "images": 3}')
    with pytest.raises(UserError, match=r"packed.json cannot be read \(without classes, encoding"):
        index.load_folder(out / "train")


def test_machines_pack_parts_of_one_set(source, packed_set, tmp_path):
    out = tmp_path / "out"
    for part in ("2/2", "1/2"):
        assert pack(source, out, "--images-per-file=8", f"--shard={part}") == 0
        assert packed.is_packed(out / "train")
    for path in packed_set.rglob("*.*"):
        assert path.read_bytes() == (out / path.relative_to(packed_set)).read_bytes()


def test_damage_is_found_by_the_checksums_and_when_it_is_read(packed_set, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(packed_set, out)
    assert pack(out, "--verify") == 0
    tar = out / "train" / "train-000002.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert pack(out, "--verify") == 1
    assert f"{tar}: its checksum is wrong" in capsys.readouterr().out
    tar.write_bytes(content[:1000])
    train = index.load_folder(out / "train")
    cut = [i for i in range(len(train)) if train.places.shard_N[i] == 2]
    with pytest.raises(decode.BadImage, match="train-000002.tar is cut short"):
        train.read(cut[-1])


def test_images_encoded_anew_are_another_data_set(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert pack(source, out, "--short-side=32", "--quality=80") == 0
    folder, found = index.load_splits(str(source)).train, index.load_splits(str(out)).train
    assert list(folder.names()) == list(found.names()) and folder.fingerprint != found.fingerprint
    for i, name in enumerate(found.names()):
        if name == "ant/broken.jpg":  # kept, and found by training
            assert found.read(i) == folder.read(i)
            continue
        old, new = (decode.open_rgb(each.path(i), each.read(i)) for each in (folder, found))
        assert min(new.size) == 32
        expected = np.asarray(transforms.resize_short_side(old, 32), int)
        assert np.abs(np.asarray(new, int) - expected).mean() < 12
    with pytest.raises(UserError, match=r"^OUT: .*train holds a set of other encoding; choose another"):
        pack(source, out, "--quality=80")


def test_a_flat_validation_set_keeps_its_label_file(tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "out"
    draw_images(folder / "train", ["ant", "bee"], 2)
    draw_images(folder / "drawn", ["x"], 4)
    (folder / "drawn" / "x").rename(folder / "val")
    (folder / "val_label.txt").write_text("".join(f"{i:04d}.jpg {i % 2}\n" for i in (2, 0, 3, 1)))
    assert pack(folder, out) == 0
    a, b = (index.load_splits(str(root)).val for root in (folder, out))
    assert list(b.names()) == ["0002.jpg", "0000.jpg", "0003.jpg", "0001.jpg"] == list(a.names())
    assert b.fingerprint == a.fingerprint and b.labels.tolist() == [0, 0, 1, 1]
    assert [a.read(i) for i in range(4)] == [b.read(i) for i in range(4)]


def test_open_files_are_few_and_stay_with_their_process(packed_set, monkeypatch):
    monkeypatch.setattr(packed, "_OPEN_FILES", 2)
    train = index.load_folder(packed_set / "train")
    before = len(os.listdir("/proc/self/fd"))
    content = [train.read(i) for i in range(len(train))]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    again = pickle.loads(pickle.dumps(train.places))
    assert not again._files and again.read(5, "x") == content[5]


def test_a_label_file_of_names_is_packed_and_mistakes_in_val_come_first(source, tmp_path):
    data = shutil.copytree(source, tmp_path / "data")
    shutil.rmtree(data / "val")
    (data / "val").mkdir()
    labels = {}
    for path in sorted((source / "val").glob("*/*")):
        labels[f"{path.parent.name}_{path.name}"] = path.parent.name
        shutil.copy(path, data / "val" / f"{path.parent.name}_{path.name}")
    with pytest.raises(UserError, match="DIR: .*val holds no class folders"):
        pack(data, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))
    (data / "val_label.txt").write_text("".join(f"{name} {label}\n" for name, label in labels.items()))
    assert pack(data, tmp_path / "out") == 0
    found = index.load_splits(str(tmp_path / "out")).val
    assert [found.classes[k] for k in found.labels] == [labels[name] for name in found.names()]
    (data / "train" / "ant" / "link.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match="^DIR: .*train/ant/link.jpg cannot be read .*tools/check_data.py lists"):
        pack(data, tmp_path / "out2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard=3/2"], "--shard: 3/2, must be I/N"),
        (["--shard=x"], "--shard: x, must be I/N"),
        (["--verify"], "OUT: .*out, but --verify checks DIR"),
    ],
)
def test_mistakes_are_named(source, tmp_path, words, message):
    with pytest.raises(UserError, match=f"^{message}"):
        pack(source, tmp_path / "out", *words)
    with pytest.raises(UserError, match="^DIR: .* holds no packed data set"):
        pack(source, "--verify")
    for inside in ("train", "val/ant"):
        with pytest.raises(UserError, match="^OUT: .*, whose images are packed; choose a folder outside"):
            pack(source, source / inside / "packed")
    (tmp_path / "used" / "train").mkdir(parents=True)
    (tmp_path / "used" / "train" / "x").touch()
    with pytest.raises(UserError, match="^OUT: .*used/train is not empty"):
        pack(source, pathlib.Path(tmp_path / "used"))
