"""The generated data set: reproducible, ImageNet's layout, classes that color alone does not separate."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from support import ROOT, user_error

from common.data import index


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("sample") / "data"
    subprocess.run(
        [sys.executable, ROOT / "tools" / "make_sample_data.py", folder, "--train-per-class=30", "--val-per-class=15"],
        check=True,
        capture_output=True,
    )
    return folder


def digest(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.JPEG"))
    }


def test_the_same_arguments_draw_the_same_images(sample, run, tmp_path):
    for name, seed, equal in (("again", 0, True), ("other", 1, False)):
        run(
            ROOT / "tools" / "make_sample_data.py",
            tmp_path / name,
            "--train-per-class=30",
            "--val-per-class=15",
            f"--seed={seed}",
        )
        assert (digest(tmp_path / name) == digest(sample)) == equal


def test_it_is_a_dataset_of_ten_classes(sample):
    splits = index.load_splits(str(sample))
    assert len(splits.classes) == 10 and len(splits.train) == 300 and len(splits.val) == 150


def test_sizes_modes_and_orientations_vary_as_in_imagenet(sample):
    files = [Image.open(path) for path in sample.rglob("*.JPEG")]
    shapes = [image.width / image.height for image in files]
    assert len({image.size for image in files}) > 300
    assert min(shapes) < 0.8 and max(shapes) > 1.4
    assert 0.04 < sum(image.mode == "L" for image in files) / len(files) < 0.2
    assert 0.04 < sum(image.getexif().get(0x0112) in (3, 6, 8) for image in files) / len(files) < 0.2


def test_mean_colors_classify_less_than_half_of_the_images(sample):
    """Fifteen nearest neighbors on the mean color of the training images."""

    def features(part):
        paths = sorted((sample / part).rglob("*.JPEG"))
        return (
            np.array([np.asarray(Image.open(p).convert("RGB")).mean(axis=(0, 1)) for p in paths]),
            np.array([p.parent.name for p in paths]),
        )

    (train, train_labels), (val, val_labels) = features("train"), features("val")
    nearest = np.argsort(((val[:, None] - train[None]) ** 2).sum(-1), axis=1)[:, :15]
    guesses = [max(set(votes), key=votes.count) for votes in (list(train_labels[row]) for row in nearest)]
    assert np.mean(guesses == val_labels) < 0.5


def test_a_folder_with_content_is_left_alone(sample, run):
    assert "is not an empty folder" in user_error(run(ROOT / "tools" / "make_sample_data.py", sample, check=2))
