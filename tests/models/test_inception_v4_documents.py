"""The documents of Inception v4 agree with its files."""

import json
import re

from support import ROOT

FOLDER = ROOT / "inception_v4"
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
    sources += [
        path for package in ("deploy", "evaluation") for path in sorted((ROOT / "common" / package).glob("*.py"))
    ]
    for path in sources:
        for address in re.findall(r"https?://[^\s\"')>;,]+", path.read_text()):
            assert address.rstrip("/.") in listed, f"{path}: {address}"
