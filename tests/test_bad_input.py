"""Errors of the user: one line that names the flag or file, exit status 2, no file written."""

import shutil

import pytest
import torch
from support import LAUNCH_TINY, ROOT, TINY, user_error
from tiny import PROGRAM


@pytest.fixture
def data(images, tmp_path):
    """A copy of the data set for the test to damage."""
    shutil.copytree(images, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Folder of a finished run with 3 classes at 32 pixels."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    PROGRAM.main(["--data", str(images), "--output-dir", str(folder), "--epochs=1"])
    return folder


def launcher(*keys, devices=1, options=()):
    return [*LAUNCH_TINY, "--device=cpu", "--batch_size=12", f"--devices={devices}", *keys, "--", *options]


def starts(data_flag, keys, options, tmp_path):
    """The same mistake through train.py itself, and through the launcher with one and two ranks."""
    yield [
        TINY,
        *([f"--data={data_flag}"] if data_flag else []),
        *[key.replace("data_path", "data") for key in keys],
        *options,
    ]
    for devices in (1, 2):
        yield launcher(*([f"--data_path={data_flag}"] if data_flag else []), *keys, devices=devices, options=options)


def every_way(run, tmp_path, data, message, *options, keys=()):
    """Run all three in a folder that must stay empty, and assert status and message of each."""
    empty = tmp_path / "cwd"
    for words in starts(data, keys, options, tmp_path):
        empty.mkdir(exist_ok=True)
        found = user_error(run(*words, check=2, cwd=empty))
        assert message in found.replace("--data_path", "--data"), (words, found)
        assert list(empty.iterdir()) == [], "something was left behind"


def test_missing_data_path(run, tmp_path):
    every_way(run, tmp_path, "", "--data: missing; give the folder that holds train/ and val/")


def test_no_val_folder(run, tmp_path, data):
    shutil.rmtree(data / "val")
    every_way(run, tmp_path, data, "has no val/ folder; expected train/ and val/")


def test_an_empty_class_folder(run, tmp_path, data):
    (data / "train" / "dog").mkdir()
    every_way(run, tmp_path, data, f"class folder {data / 'train' / 'dog'} holds no images")


def test_a_class_in_val_that_train_lacks(run, tmp_path, data):
    (data / "val" / "bee").rename(data / "val" / "eel")
    every_way(run, tmp_path, data, "val/ has class folders that train/ lacks: eel")


def test_an_empty_label_file(run, tmp_path, data):
    shutil.rmtree(data / "val")
    (data / "val").mkdir()
    (data / "val_label.txt").write_text("\n")
    every_way(run, tmp_path, data, "val_label.txt: no labels; expected a line NAME INDEX per image")


def test_batch_size_zero(run, tmp_path, data):
    every_way(run, tmp_path, data, "--batch-size: 0, must be at least 1", keys=("--batch_size=0",))


def test_a_batch_that_the_devices_cannot_share(run, tmp_path, data):
    words = launcher(f"--data_path={data}", "--batch_size=7", devices=2)
    assert "--batch-size: 7, must be divisible by 2" in user_error(run(*words, check=2))
    every_way(
        run, tmp_path, data, "--batch-size: 14, must be divisible by", "--accumulate=4", keys=("--batch_size=14",)
    )


def test_a_training_set_smaller_than_one_step(run, tmp_path, data):
    every_way(run, tmp_path, data, "a step takes 64 images, but train/ holds 60", keys=("--batch_size=64",))


def test_npu_without_torch_npu(run, tmp_path, data):
    every_way(
        run, tmp_path, data, "--device: npu is not available: torch_npu is not installed", "--device=auto", "--npu", "0"
    )


def test_a_checkpoint_of_another_network(run, tmp_path, data, trained):
    state = torch.load(trained / "checkpoint.pth.tar", weights_only=True)
    torch.save({**state, "arch": "other"}, tmp_path / "other.pth.tar")
    every_way(run, tmp_path, data, "holds other, this script trains tiny", f"--resume={tmp_path / 'other.pth.tar'}")


def test_a_truncated_checkpoint(run, tmp_path, data, trained):
    torn = tmp_path / "torn.pth.tar"
    torn.write_bytes((trained / "checkpoint.pth.tar").read_bytes()[:5000])
    every_way(run, tmp_path, data, f"{torn}: truncated or damaged", f"--resume={torn}")


def test_an_output_folder_that_holds_a_run(run, tmp_path, data, trained):
    before = sorted(path.name for path in trained.iterdir())
    every_way(run, tmp_path, data, "already holds a run; choose another folder", keys=(f"--output_dir={trained}",))
    assert sorted(path.name for path in trained.iterdir()) == before


def test_a_class_count_that_contradicts_the_checkpoint(run, tmp_path, data, trained):
    checkpoint = trained / "checkpoint.pth.tar"
    every_way(run, tmp_path, data, "--num-classes: 5, but", f"--resume={checkpoint}", "-p", "5")


def test_fewer_classes_than_folders(run, tmp_path, data):
    every_way(run, tmp_path, data, "--num-classes: 2, but train/ has 3 class folders", "-p", "2")


def test_an_image_size_below_the_networks(run, tmp_path, data):
    every_way(run, tmp_path, data, "--image-size:", "--image-size=8")


def test_an_unknown_schedule_and_an_unknown_option(run, tmp_path, data):
    every_way(run, tmp_path, data, "--lr-schedule: steep, must be one of", "--lr-schedule=steep")
    every_way(run, tmp_path, data, "--learnin-rate: unknown option; did you mean --learning-rate?", "--learnin-rate")


def test_data_that_changed_since_the_checkpoint(run, tmp_path, data, trained):
    (data / "train" / "ant" / "0000.jpg").unlink()
    every_way(run, tmp_path, data, "does not hold the images that", f"--resume={trained / 'checkpoint.pth.tar'}")


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("devices", [0, 1, 2])
def test_a_truncated_jpeg_is_named(run, data, part, devices):
    broken = data / part / "cat" / "0004.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    words = (
        launcher(f"--data_path={data}", devices=devices, options=["--epochs=1"]) if devices else [TINY, "--data", data]
    )
    found = user_error(run(*words, check=2))
    assert found.startswith(f"{broken}: does not decode as an image") and "replace or remove it" in found


def test_an_unknown_launcher_key_lists_the_known_ones(run, tmp_path):
    scripts = sorted((ROOT / "inception_v3" / "test").glob("*.sh"))
    assert len(scripts) >= 6
    for script in scripts:
        found = user_error(run(script, "--data_pth=x", check=2))
        assert found.startswith("--data_pth: unknown key; known are batch_size, data_path, device,")
    assert list(tmp_path.iterdir()) == []


def test_an_argument_without_a_key(run):
    found = user_error(run(ROOT / "inception_v3" / "test" / "train_full_1p.sh", "data", check=2))
    assert found.startswith("data: expected --key=value; options for the program itself go after a lone --")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("inception_v4/pth2onnx.py --ckpt in.pth --onnx in.pth", "--onnx: in.pth is --ckpt; name another file"),
        ("inception_v3/pthtar2onnx.py --ckpt in.pth --onnx ./link.pth", "--onnx: ./link.pth is --ckpt; name another"),
        ("inception_v4/postprocess.py --infer-results . --anno-file in.txt --metrics-json in.txt", "is --anno-file;"),
        (
            "inception_v3/eval.py --data . --resume in.onnx --metrics-json in.onnx",
            "--metrics-json: in.onnx is --resume",
        ),
        (
            "inception_v4/eval.py --data . --resume in.onnx --metrics-json val_label.txt",
            "val_label.txt is the label file",
        ),
        (
            "inception_v3/eval.py --data . --resume in.onnx --class-names in.json --predictions in.json",
            "--predictions: in.json is --class-names; name another file",
        ),
        (
            "xception/eval.py --dataset_path . --checkpoint_path in.pth --log-file in.pth",
            "--log-file: in.pth is --check",
        ),
        ("inception_v3/demo.py x.jpg --class-names in.json --predictions in.json", "in.json is --class-names"),
        ("tools/compare.py in.onnx in.pth --data . --json in.onnx", "--json: in.onnx is A; name another file"),
        ("tools/compare.py in.onnx in.pth --data val --json val_label.txt", "val_label.txt is the label file"),
        (
            "tools/study.py --data . --recipes scratch --json in.onnx",
            "--json: in.onnx exists and holds no rows of a study",
        ),
        (
            "tools/study.py --data . --recipes scratch --json in.json",
            "--json: in.json exists and holds no rows of a study",
        ),
        ("tools/compare.py in.onnx in.pth --data . --json val_label.txt", "val_label.txt is the label file"),
        ("tools/report.py --study in.json --out in.json", "--out: in.json, must end in .html"),
        ("tools/convert_weights.py in.pth in.pth --arch inception_v3", "OUT: in.pth is IN; name another file"),
    ],
)
def test_a_file_that_is_read_is_not_written(command, message, run, tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("in.pth", "in.onnx", "in.txt", "in.json", "val_label.txt"):
        (tmp_path / name).write_text("content")
    (tmp_path / "link.pth").symlink_to("in.pth")
    program, *words = command.split()
    assert message in user_error(run(ROOT / program, *words, check=2, cwd=tmp_path))
    assert {path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"content"}
