"""Training, eval.py and postprocess.py give one label file the same meaning, and suspect labels that count from 1."""

import shutil

import numpy as np
import pytest
import torch
from tiny import PROGRAM, SPEC

from common.data import index
from common.deploy import postprocess
from common.errors import UserError
from common.evaluation import program

NAMES = ("ant", "bee", "cat")
NOTE = (
    "note: top-1 is 0.00 %, and 100.00 % if every label were one smaller; the file holds no label 0: "
    "if it counts from 1, give --label-numbers=from-1"
)


@pytest.fixture
def data(images, tmp_path, monkeypatch):
    """train/, and val/ with ant.jpg, bee.jpg, cat.jpg."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images / "train", tmp_path / "data" / "train")
    (tmp_path / "data" / "val").mkdir()
    for name in NAMES:
        shutil.copy(images / "val" / name / "0000.jpg", tmp_path / "data" / "val" / f"{name}.jpg")
    return tmp_path / "data"


def checkpoint(path):
    """A network of 3 classes that predicts class 1 for every image."""
    model = SPEC.build(num_classes=3)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    state = model.state_dict()
    torch.save(dict(arch="tiny", state_dict=state, build={**SPEC.build_options, "num_classes": 3}, image_size=32), path)
    return str(path)


def evaluated(data, **options):
    return program.evaluate_folder(
        SPEC,
        program.EvalConfig(data=str(data), resume=checkpoint(data / "x.pth"), device="cpu", workers=0, **options),
    )[0]


@pytest.mark.parametrize(
    "text",
    [
        "ant.jpg 0\nbee.jpg 1\ncat.jpg 2\n",
        "ant.JPEG 0\nbee.png 1\ncat 2\n",
        "./val/ant.jpg\t0\nval/bee.jpg\t1\ncat.jpg\t2\n",
        "\ufeffant,0\nbee,1\ncat,2\n",
    ],
)
def test_all_readers_agree(data, text):
    (data / "val_label.txt").write_text(text)
    found = index.load_val(str(data), NAMES)
    assert [(found.name(i), int(found.labels[i])) for i in range(3)] == [("ant.jpg", 0), ("bee.jpg", 1), ("cat.jpg", 2)]
    counts = evaluated(data)
    assert (counts.correct[0], counts.seen) == (1, 3)
    (data / "results").mkdir()
    for label, name in enumerate(NAMES):
        np.save(data / "results" / f"{name}_0.npy", np.eye(3, dtype=np.float32)[label])
    files = dict(infer_results=str(data / "results"), anno_file=str(data / "val_label.txt"))
    counts, _ = postprocess.score(SPEC, postprocess.PostprocessConfig(**files, num_classes=3, workers=1))
    assert (counts.correct[0], counts.seen) == (3, 3)


def test_class_names_are_read_where_class_folders_are_known(data):
    (data / "val_label.txt").write_text("ant.jpg ant\nbee.jpg bee\ncat.jpg cat\n")
    assert index.load_val(str(data), NAMES).labels.tolist() == [0, 1, 2]
    assert evaluated(data).correct[0] == 1  # the checkpoint has no class names: those of train/
    shutil.rmtree(data / "train")
    with pytest.raises(UserError, match="it looks like NAME CLASS: write the position of the class"):
        evaluated(data)


def test_two_labels_of_one_image_are_refused(data):
    (data / "val_label.txt").write_text("ant.png 0\nant 1\nbee 1\ncat 2\n")
    with pytest.raises(UserError, match="has several labels for ant.jpg of .*: ant.png and ant; keep one"):
        index.load_val(str(data), NAMES)


def test_evaluation_suspects_labels_from_1(data, capsys):
    (data / "val_label.txt").write_text("ant 2\nbee 2\ncat 2\n")
    assert evaluated(data).correct[0] == 0 and NOTE in capsys.readouterr().out.splitlines()
    assert evaluated(data, label_numbers="from-1").correct[0] == 3 and "note" not in capsys.readouterr().out
    (data / "val_label.txt").write_text("ant 0\nbee 2\ncat 2\n")  # a label 0: they do not count from 1
    assert evaluated(data).correct[0] == 0 and "note" not in capsys.readouterr().out
    (data / "val_label.txt").write_text("ant 1\nbee 2\ncat 3\n")
    with pytest.raises(UserError, match=r"label 3, the classes are 0\.\.2; the file holds no label 0: if it"):
        evaluated(data)
    assert evaluated(data, label_numbers="from-1").seen == 3
    (data / "val_label.txt").write_text("ant 1\nbee 2\ncat 970\n")  # one smaller is no class either
    with pytest.raises(UserError, match=r"label 970, the classes are 0\.\.2$"):
        evaluated(data)


def test_training_suspects_labels_from_1_once(data, capsys):
    (data / "val_label.txt").write_text("ant 2\nbee 2\ncat 2\n")
    weights = checkpoint(data / "x.pth")
    common = ["--data", str(data), "--pretrained", weights, "--image-size=32", "--lr=1e-9", "--epochs=2", "-b", "20"]
    PROGRAM.main([*common, "--output-dir=run"])
    assert capsys.readouterr().out.splitlines().count(NOTE) == 1
    PROGRAM.main([*common, "--output-dir=again", "--label-numbers=from-1"])
    printed = capsys.readouterr().out
    assert NOTE not in printed and "Acc@1 100.000" in printed
