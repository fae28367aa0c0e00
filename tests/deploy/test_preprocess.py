"""Input files: their bytes, what a second run does, and every input that must be refused."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import REAL_DATA, ROOT, SIZE, fails, plain_input, plain_pixels, run_script

REAL_IMAGES = REAL_DATA / "imagenet300"
SCRIPT = "inception_v4/preprocess.py"
SMALL = ("--image-size", SIZE)


@pytest.mark.parametrize(
    ("dtype", "format", "size"),
    [
        ("float32", "bin", 1_072_812),
        ("float16", "bin", 536_406),
        ("uint8", "bin", 268_203),
        ("float32", "npy", 1_072_812 + 128),
        ("float16", "npy", 536_406 + 128),
        ("uint8", "npy", 268_203 + 128),
    ],
)
def test_every_file_equals_the_published_arithmetic(dtype, format, size, photos, tmp_path):
    target = tmp_path / "prep"
    done = run_script(SCRIPT, "--src_path", photos, "--save_path", target, "--dtype", dtype, "--format", format)
    assert done.returncode == 0, done.stderr
    assert len(list(target.glob(f"*.{format}"))) == 24 and "24 files" in done.stdout
    for source in sorted(photos.iterdir()):
        path = target / f"{source.name.split('.')[0]}.{format}"
        expected = plain_pixels(source, 299) if dtype == "uint8" else plain_input(source, 299).astype(dtype)
        assert path.stat().st_size == size and path.stat().st_mode & 0o777 == 0o640
        if format == "npy":
            array = np.load(path)
            assert (
                array.shape == (1, *expected.shape) and array.dtype == dtype and array.tobytes() == expected.tobytes()
            )
        else:
            assert path.read_bytes() == expected.tobytes()


def test_v3_files_are_torchvisions_evaluation_transform(photos, tmp_path):
    from torchvision import transforms

    published = transforms.Compose(
        [
            transforms.Resize(342),
            transforms.CenterCrop(299),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    done = run_script("inception_v3/preprocess.py", "--src_path", photos, "--save_path", tmp_path / "prep")
    assert done.returncode == 0, done.stderr
    for path in sorted(photos.iterdir()):
        expected = published(Image.open(path).convert("RGB")).numpy()
        actual = np.fromfile(tmp_path / "prep" / f"{path.name.split('.')[0]}.bin", np.float32)
        np.testing.assert_array_equal(actual.reshape(3, 299, 299), expected, path.name)


@pytest.mark.realdata
@pytest.mark.skipif(not REAL_IMAGES.is_dir(), reason="the real photographs are not here")
def test_real_photographs_equal_the_plain_program(tmp_path):
    source = tmp_path / "val"
    source.mkdir()
    for path in sorted((REAL_IMAGES / "val").iterdir())[::5]:
        (source / path.name).symlink_to(path)
    subprocess.run([sys.executable, ROOT / "tests/bench/plain_preprocess.py", source, tmp_path / "plain"], check=True)
    assert run_script(SCRIPT, "--src-path", source, "--save-path", tmp_path / "prep").returncode == 0
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "prep" / path.name).read_bytes(), path.name


def convert(photos, target, *more):
    done = run_script(SCRIPT, "--src_path", photos, "--save_path", target, *SMALL, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copies(photos, tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    for path in sorted(photos.iterdir())[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_second_run_converts_only_what_is_missing_or_changed(copies, tmp_path):
    target = tmp_path / "prep"
    convert(copies, target)
    first, second, third, *_ = sorted(target.glob("*.bin"))
    kept = first.stat().st_mtime_ns, first.stat().st_ino
    second.unlink()
    third.write_bytes(third.read_bytes()[:100])  # torn by something else
    changed = sorted(copies.iterdir())[3]
    Image.new("RGB", (100, 90), (1, 2, 3)).save(changed, "JPEG")
    out = convert(copies, target)
    assert ": 3 files" in out and "3 kept" in out
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == kept
    assert (target / f"{changed.name.split('.')[0]}.bin").read_bytes() == plain_input(changed).tobytes()
    assert ": 6 files" in convert(copies, target, "--no-resume")


def replace_keeping_size_and_time(path, other):
    """Replace a file by an image of other content, the same size and the same modification time."""
    before, content = path.stat(), other.read_bytes()
    padded = content.ljust(before.st_size, b"\0")  # JPEG ends with a marker: what follows is ignored
    assert len(padded) == before.st_size
    draft = path.with_name("draft")
    draft.write_bytes(padded)
    os.utime(draft, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(draft, path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_replaced_image_of_equal_size_and_time_is_converted_again(copies, tmp_path):
    by_size = sorted(copies.iterdir(), key=lambda path: path.stat().st_size)
    small, large = by_size[0], by_size[-1]
    convert(copies, tmp_path / "prep")
    replace_keeping_size_and_time(large, small)
    out = convert(copies, tmp_path / "prep")
    assert ": 1 files" in out and "5 kept" in out
    expected = plain_input(small).tobytes()
    assert (tmp_path / "prep" / f"{large.name.split('.')[0]}.bin").read_bytes() == expected
    assert ": 0 files" in convert(copies, tmp_path / "prep")  # its change time differs from its modification time


def test_a_folder_of_images_that_replaces_another_one_is_converted_again(copies, tmp_path):
    """The same path, names, sizes and times, other images: as after unpacking another archive there."""
    convert(copies, tmp_path / "prep")
    names = sorted(path.name for path in copies.iterdir())
    other = tmp_path / "other"
    other.mkdir()
    for name, source in zip(names, names[::-1], strict=True):
        (other / name).write_bytes((copies / source).read_bytes())
        os.utime(other / name, ns=((copies / name).stat().st_mtime_ns,) * 2)
    copies.rename(tmp_path / "old")
    other.rename(copies)
    assert ": 6 files" in convert(copies, tmp_path / "prep")


def test_files_of_an_earlier_version_are_converted_again(copies, tmp_path):
    convert(copies, tmp_path / "prep")
    record = tmp_path / "prep" / "preprocess.json"
    record.write_text(record.read_text().replace('"rules": ', '"other": '))
    assert ": 6 files" in convert(copies, tmp_path / "prep")
    assert ": 0 files" in convert(copies, tmp_path / "prep")


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_are_left_out_on_request_and_listed(workers, copies, tmp_path):
    arguments = ("--src_path", copies, "--save_path", tmp_path / "prep", *SMALL, "--workers", workers)
    convert(copies, tmp_path / "prep")
    broken, missing = sorted(copies.iterdir())[2:4]
    broken.write_bytes(broken.read_bytes()[:200])
    missing.unlink()
    missing.symlink_to("nowhere")
    fails(run_script(SCRIPT, *arguments), "does not decode")
    done = run_script(SCRIPT, *arguments, "--on-bad-image=skip")
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [f"skipped: {broken}", f"skipped: {missing}"]
    assert ": 0 files" in done.stdout and "4 kept from an earlier run, 2 left out; postprocess.py then" in done.stdout
    # What was made from the images that were there before is gone.
    assert len(list((tmp_path / "prep").glob("*.bin"))) == 4
    for path in copies.iterdir():
        path.unlink()
        path.write_bytes(b"x")
    done = run_script(SCRIPT, *arguments, "--on-bad-image=skip")
    assert done.returncode == 2 and "has 6 images, and none of them decodes" in done.stderr.splitlines()[-1]


def test_folder_of_other_settings_or_other_images_is_refused(copies, tmp_path):
    target = tmp_path / "prep"
    convert(copies, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    arguments = ("--src_path", copies, "--save_path", target, "--image-size", 99)
    fails(run_script(SCRIPT, *arguments), "--save-path", "image_size 75 instead of 99", "--no-resume")
    sorted(copies.iterdir())[0].unlink()
    fails(run_script(SCRIPT, "--src_path", copies, "--save_path", target, *SMALL), "belong to no image")
    assert before == {path.name: path.read_bytes() for path in target.iterdir()}


def test_photographs_are_turned_where_asked_to(tmp_path):
    """Files made with and without --upright do not mix; those of an older version were made without."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "x.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "in" / "y.png")
    words = ["--src_path", tmp_path / "in", "--dtype", "uint8", *SMALL, "--save_path"]
    for out, options, equal in (("stored", [], False), ("turned", ["--upright"], True)):
        assert run_script(SCRIPT, *words, tmp_path / out, *options).returncode == 0
        assert ((tmp_path / out / "x.bin").read_bytes() == (tmp_path / out / "y.bin").read_bytes()) == equal
    fails(run_script(SCRIPT, *words, tmp_path / "turned"), "made with upright True instead of False")
    record = tmp_path / "stored" / "preprocess.json"
    record.write_text(record.read_text().replace(', "upright": false', ""))
    assert "2 kept from an earlier run" in run_script(SCRIPT, *words, tmp_path / "stored").stdout
    fails(run_script(SCRIPT, *words, tmp_path / "stored", "--upright"), "made with upright False instead of True")
    record.write_text("null")
    fails(
        run_script(SCRIPT, *words, tmp_path / "stored"),
        "preprocess.json is damaged",
        "--no-resume makes the input files again",
    )


def test_colliding_names_are_refused_before_anything_is_written(copies, tmp_path):
    (copies / "ILSVRC2012_val_00000001.old.JPEG").write_bytes(b"")
    fails(
        run_script(SCRIPT, "--src_path", copies, "--save_path", tmp_path / "prep"),
        "ILSVRC2012_val_00000001.JPEG and ILSVRC2012_val_00000001.old.JPEG",
        "rename",
    )
    assert not (tmp_path / "prep").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_image_is_named_and_the_rest_can_go_on_later(workers, copies, tmp_path):
    broken = sorted(copies.iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = ("--src_path", copies, "--save_path", tmp_path / "prep", *SMALL, "--workers", workers)
    fails(run_script(SCRIPT, *arguments), str(broken), "does not decode")
    assert not list((tmp_path / "prep").glob(f"{broken.name.split('.')[0]}*"))
    Image.new("RGB", (80, 90)).save(broken, "JPEG")
    assert run_script(SCRIPT, *arguments).returncode == 0


def test_other_files_are_left_out_and_counted(copies, tmp_path):
    (copies / "val_label.txt").write_text("x 1\n")
    assert f"{copies}: 1 entries that are no images are left out\n" in convert(copies, tmp_path / "prep")
    for folder in ("n01440764", "n01443537", ".ipynb_checkpoints", "looks like.jpg"):
        (copies / folder).mkdir()
    for name in ("a.gif", "b.avif", "c.avif", "._d.jpg", "Thumbs.db"):
        (copies / name).write_bytes(b"x")
    assert (
        f"{copies}: 10 entries that are no images are left out: 3 folders, which are not searched, 3 hidden, "
        "2 .avif, 1 .gif, which are not read; convert them to JPEG or PNG\n"
    ) in convert(copies, tmp_path / "prep")


def test_a_folder_of_class_folders_is_named_as_such(tmp_path):
    for name in ("n01440764", "n01443537"):
        (tmp_path / "val" / name).mkdir(parents=True)
    fails(
        run_script(SCRIPT, "--src_path", tmp_path / "val", "--save_path", tmp_path / "prep"),
        "has no images among its 2 entries; expected a flat folder",
        "2 entries that are no images are left out: 2 folders, which are not searched",
    )


def test_no_images(tmp_path):
    fails(run_script(SCRIPT, "--src_path", tmp_path, "--save_path", tmp_path / "prep"), "--src-path", "no images")
    fails(run_script(SCRIPT, "--src_path", tmp_path / "x", "--save_path", tmp_path / "prep"), "is not a folder")
    fails(run_script(SCRIPT, "--src_path", tmp_path), "--save-path: missing")
    Image.new("RGB", (80, 80)).save(tmp_path / "a.png")
    fails(run_script(SCRIPT, "--src_path", tmp_path, "--save_path", f"{tmp_path}/."), "--save-path: ", "is --src-path")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert not (tmp_path / "prep").exists()


@pytest.mark.parametrize("script", ["preprocess", "postprocess"])
def test_scripts_without_torch(script):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'inception_v4' / (script + '.py'))!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import common.deploy.preprocess, common.deploy.postprocess\n"
        "assert not {'torch', 'onnxruntime', 'onnx'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_raw_files_take_no_numpy(dtype):
    code = (
        "import sys; from PIL import Image; from common.deploy.preprocess import Encoder\n"
        "from inception_v4.spec import SPEC\n"
        f"encoder = Encoder(SPEC, {SIZE}, {dtype!r}, 'bin')\n"
        "parts = encoder.encode(Image.new('RGB', (90, 80)))\n"
        "assert sum(map(len, parts)) == encoder.file_size and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_smaller_inputs_equal_the_same_arithmetic(photos, tmp_path):
    """Tall images among them: PIL 13 resizes their columns first, so that nothing may be left out between the passes."""
    convert(photos, tmp_path / "prep", "--dtype", "uint8")
    for source in sorted(photos.iterdir()):
        assert (tmp_path / "prep" / f"{source.name.split('.')[0]}.bin").read_bytes() == plain_pixels(source).tobytes()
