"""What the documents promise is what the files hold."""

import json
import re

import numpy as np
from deployment import REPO, run_script

FOLDER = REPO / "inception_v4"
OURS = ("preprocess.py", "pth2onnx.py", "postprocess.py", "eval.py", "spec.py", "model.py", "README.md")


def test_readme_table_is_results_json():
    rows = json.loads((FOLDER / "results.json").read_text())
    text = (FOLDER / "README.md").read_text().replace("**", "")
    assert [row["batch_size"] for row in rows] == [1, 4, 8, 16, 32, 64]
    for row in rows:
        assert row["source"] == "reported"
        assert (
            f"| {row['device']} | {row['batch_size']} | {row['acc1']} % | {row['acc5']} % | {row['fps']} | reported |"
            in text
        )


def test_every_address_is_listed_with_its_reason():
    listed = (FOLDER / "public_address_statement.md").read_text()
    sources = [FOLDER / name for name in OURS]
    sources += [path for room in ("deploy", "evaluation") for path in sorted((REPO / "common" / room).glob("*.py"))]
    for path in sources:
        for address in re.findall(r"https?://[^\s\"')>;,]+", path.read_text()):
            assert address.rstrip("/.") in listed, f"{path}: {address}"


def test_v3_files_are_torchvisions_evaluation_transform(photos, tmp_path):
    from PIL import Image
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
