"""demo.py: broken files, validation images without arguments, other model files, class names."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, draw_images, run_program
from tiny import PROGRAM, SPEC

from common import run_folder
from common.deploy import export
from common.errors import UserError
from common.evaluation import class_names, predict
from tools import models


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Folder with output/tiny_train/00000, a run of 30 epochs that tells some classes apart."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        PROGRAM.main(["--data", str(images), "--epochs=30", "--print-freq=100", "--label-smoothing=0"])
    return folder


@pytest.fixture
def demo(trained, monkeypatch, capsys):
    """demo(*words) -> (status, standard output, standard error), in the folder of the run."""
    monkeypatch.chdir(trained)

    def run(*words, spec=SPEC, **options):
        monkeypatch.setattr("sys.argv", ["demo.py", *map(str, words), "--device=cpu"])
        status = 0
        try:
            predict.main(spec, "", **options)
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_without_images_it_names_validation_images_of_the_newest_run(demo, images):
    status, out, _ = demo()
    first, *lines, last = out.splitlines()
    best = pathlib.Path("output/tiny_train/00000/model_best.pth.tar")
    assert status == 0 and first == f"{best}: 8 of the 21 validation images in {images / 'val'}"
    found = [
        re.fullmatch(r"(\S+)  guess: (\w+) \((\d+\.\d\d) %\), truth: (\w+)", line.replace(str(images), "D"))
        for line in lines
    ]
    assert [match[4] for match in found] == [match[1].split("/")[2] for match in found]
    assert {match[4] for match in found} == {"ant", "bee", "cat"} and len({match[1] for match in found}) == 8
    # The guesses are those of the images given by name.
    given = demo(*(images / match[1].removeprefix("D/") for match in found))[1].splitlines()
    assert [line.split()[-1] for line in given[1::4]] == [match[2] for match in found]
    assert len({match[2] for match in found}) > 1
    assert last == f"{sum(match[2] == match[4] for match in found)} of 8 are right"


def test_a_newer_run_of_another_network_is_passed_over(demo, trained):
    newer = trained / "output" / "other_train" / "00000"
    newer.mkdir(parents=True)
    (newer / "model_best.pth.tar").touch()
    (newer / "config.json").write_text('{"arch": "other"}')
    try:
        assert demo()[1].startswith("output/tiny_train/00000/model_best.pth.tar: 8 of the 21 ")
        assert run_folder.newest_best("other") == pathlib.Path("output/other_train/00000/model_best.pth.tar")
        with pytest.raises(UserError, match="no model_best.pth.tar here and none of third below ./output"):
            run_folder.newest_best("third")
    finally:
        shutil.rmtree(newer.parent)


def test_a_run_whose_images_are_gone_or_were_never_there(demo, trained, images, tmp_path):
    state = torch.load(trained / "output" / "tiny_train" / "00000" / "model_best.pth.tar", weights_only=True)
    for config, message in (
        ({"data": "/nowhere"}, "the images of .* are not in /nowhere; name image files or folders"),
        ({"data": ""}, "was trained without validation images; name image files"),
        (None, "does not say on which images it was trained; name image files"),
    ):
        torch.save(state | {"config": config}, tmp_path / "a.pth.tar")
        status, _, error = demo("--resume", tmp_path / "a.pth.tar")
        assert status == 2 and re.match(f"error: IMAGE: missing, and .*{message}", error), error
    torch.save(state | {"config": {"elsewhere": str(images)}}, tmp_path / "a.pth.tar")
    assert demo("--resume", tmp_path / "a.pth.tar", validation_option="elsewhere")[0] == 0


def test_it_goes_on_past_broken_files_and_reports_them_at_the_end(demo, images, tmp_path):
    good = images / "val" / "bee" / "0001.jpg"
    broken = [tmp_path / f"{n}.jpg" for n in range(6)]
    for path in broken:
        path.write_bytes(good.read_bytes()[:600])
    status, out, error = demo(broken[0], good, *broken[1:], good)
    assert status == 2 and out.count(str(good)) == 2 and out.count(" %  ") == 6
    assert error.startswith(f"error: IMAGE: 6 of 8 files do not decode: {broken[0]} (OSError: ")
    assert error.endswith("; and 1 more\n") and error.count("\n") == 1


def test_photographs_are_turned_where_asked_to(demo, images, tmp_path, monkeypatch):
    """A photograph that is stored turned is classified as its upright twin; without --upright a note says so."""
    stored, exif = Image.open(images / "val" / "bee" / "0001.jpg"), Image.Exif()
    exif[0x0112] = 6
    stored.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    stored.save(tmp_path / "upright.png")
    for words, equal, note in (((), False, True), (("--upright",), True, False)):
        status, out, _ = demo(tmp_path, *words)
        lines = [line for line in out.splitlines() if "%" in line]
        assert status == 0 and (lines[:3] == lines[3:]) == equal and len(lines) == 6
        assert ("note: EXIF says to turn 1 of 2 photographs, ignored without --upright\n" in out) == note
    monkeypatch.setattr(predict, "_HEADERS", 1)
    assert "note: EXIF says to turn 1 of the first 1 photographs" in demo(tmp_path)[1]


def test_labels_and_exclude_list_are_read_as_the_run_read_them(demo, trained, images, tmp_path):
    """A flat folder whose labels count from 1, and a list that leaves one of its images out."""
    (tmp_path / "val").mkdir()
    for n, name in enumerate(("ant", "bee", "cat", "ant")):
        (tmp_path / "val" / f"{n}.jpg").symlink_to(images / "val" / name / "0001.jpg")
    (tmp_path / "val_label.txt").write_text("0.jpg 1\n1.jpg 2\n2.jpg 3\n3.jpg 1\n")
    (tmp_path / "exclude.txt").write_text("val/3.jpg\n")
    state = torch.load(trained / "output" / "tiny_train" / "00000" / "model_best.pth.tar", weights_only=True)
    config = {"data": str(tmp_path), "exclude": str(tmp_path / "exclude.txt"), "label_numbers": "from-1"}
    torch.save(state | {"config": config}, tmp_path / "a.pth.tar")
    out = demo("--resume", tmp_path / "a.pth.tar")[1]
    assert re.findall(r"(\d).jpg .*truth: (\w+)", out) == [("0", "ant"), ("1", "bee"), ("2", "cat")]


def test_a_broken_validation_image_is_reported_too(demo, trained, tmp_path):
    draw_images(tmp_path / "data" / "val", ("ant", "bee", "cat"), 1)
    (tmp_path / "data" / "val" / "ant" / "0000.jpg").write_bytes(b"")
    state = torch.load(trained / "output" / "tiny_train" / "00000" / "model_best.pth.tar", weights_only=True)
    torch.save(state | {"config": {"data": str(tmp_path / "data")}}, tmp_path / "a.pth.tar")
    status, out, error = demo("--resume", tmp_path / "a.pth.tar")
    assert status == 2 and " of 2 are right" in out and "1 of 3 files do not decode" in error


def test_an_onnx_file_gives_the_same_classes(demo, images, trained, tmp_path):
    best = trained / "output" / "tiny_train" / "00000" / "model_best.pth.tar"
    export.export(SPEC, export.ExportConfig(ckpt=str(best), onnx=str(tmp_path / "net.onnx")))
    of_torch, of_onnx = demo(images / "val")[1], demo(images / "val", "--resume", tmp_path / "net.onnx")[1]
    assert of_onnx.endswith(of_torch[-200:]) and "bee" in of_torch[-200:]
    assert "does not say on which images" in demo("--resume", tmp_path / "net.onnx")[2]
    assert "--use-ema: " in demo(images / "val", "--model", tmp_path / "net.onnx", "--use-ema")[2]


def test_averages_are_a_choice(demo, images, tmp_path):
    raw = SPEC.build(num_classes=3).state_dict()
    averaged = {key: value.clone() for key, value in raw.items()}
    raw["fc.bias"] += torch.tensor([100.0, 0, 0])
    averaged["fc.bias"] += torch.tensor([0, 0, 100.0])
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "a.pth")
    words = (images / "val" / "bee" / "0001.jpg", "--resume", tmp_path / "a.pth")
    for flags, name in (((), "class 2"), (("--use-ema",), "class 2"), (("--no-use-ema",), "class 0")):
        out = demo(*words, *flags)[1]
        assert f"  100.00 %  {name}\n" in out and "took the weights of state_dict" in out


# ---- class names -----------------------------------------------------------------------------------------------------

INDEX = {"0": ["n00000001", "tench"], "1": ["n00000002", "shark"], "2": ["n00000003", "crane"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "tench\nshark\ncrane\n"),
        ("bom.txt", "\ufefftench\r\nshark\r\ncrane\r\n\r\n"),
        ("utf-16.txt", "tench\nshark\ncrane\n"),
        ("synset_words.txt", "n00000001 tench\nn00000002 shark\nn00000003 crane\n"),
        ("names.json", json.dumps(["tench", "shark", "crane"])),
        ("class_index.json", json.dumps(INDEX)),
        ("shuffled.json", json.dumps(dict(reversed(INDEX.items())))),
        ("plain.json", json.dumps({"0": "tench", "1": "shark", "2": "crane"})),
        ("class_to_idx.json", json.dumps({"crane": 2, "tench": 0, "shark": 1})),
    ],
)
def test_class_names_are_read_from_the_usual_files(demo, images, tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-16" if name == "utf-16.txt" else "utf-8"))
    assert class_names.names(None, 3, tmp_path / name) == ["tench", "shark", "crane"]
    out = demo(images / "val" / "bee" / "0001.jpg", "--class-names", tmp_path / name)[1]
    assert {line.split("%")[1].strip() for line in out.splitlines()[1:]} == {"tench", "shark", "crane"}


@pytest.mark.parametrize("name", ["class_index.json", "synset_words.txt", "words.json"])
def test_synsets_of_the_model_are_looked_up_whatever_their_order(tmp_path, name):
    texts = {
        "class_index.json": json.dumps(INDEX),
        "synset_words.txt": "n00000001 tench\nn00000002 shark\nn00000003 crane\n",
        "words.json": json.dumps({"n00000003": "crane", "n00000001": "tench", "n00000002": "shark"}),
    }
    (tmp_path / name).write_text(texts[name])
    assert class_names.names(["n00000003", "n00000001"], 2, tmp_path / name) == ["crane", "tench"]
    assert class_names.names(["n00000002"], 2, tmp_path / name) == ["shark", "class 1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"tench\nshark\n", "names 2 classes, the model has 3"),
        (b"caf\xe9\n", "is neither UTF-8 nor UTF-16 text; expected one name per line"),
        (b"{0: 'tench'}", "is JSON of another form; expected one name per line"),
        (b'{"0": "tench", "2": "shark"}', "is JSON of another form"),
        (b'{"0": {"name": "tench"}}', "is JSON of another form"),
        (b"[[]]", "is JSON of another form"),
        (b"", "names 0 classes"),
    ],
)
def test_other_files_of_names_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "names").write_bytes(content)
    with pytest.raises(UserError, match=f"^--class-names: .*names {message}"):
        class_names.names(None, 3, tmp_path / "names")


def test_the_models_own_names_in_another_order_are_refused(tmp_path):
    (tmp_path / "names").write_text("bee\nant\n")
    with pytest.raises(UserError, match="--class-names: .*names of the model's classes in another order"):
        class_names.names(["ant", "bee"], 2, tmp_path / "names")
    assert class_names.names(["bee", "ant"], 2, tmp_path / "names") == ["bee", "ant"]
    assert class_names.names(["a", "b"], 2, tmp_path / "names") == ["bee", "ant"]


def test_names_without_a_file():
    assert class_names.names(["a", "b"], 3) == ["a", "b", "class 2"]
    assert class_names.names(None, 2) == ["class 0", "class 1"]
    assert class_names.names(None, 1000)[0] == "tench"


# ---- the models' programs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.names())
def test_every_models_demo_needs_no_argument(images, name, tmp_path):
    """As the document types it, beside the weights of a run."""
    spec, torch_file, config = models.spec(name), tmp_path / "model_best.pth.tar", {"data": str(images)}
    if name == "xception":
        torch_file = tmp_path / "ckpt_0" / "Xception-rank0-1_5.ckpt"
        torch_file.parent.mkdir()
        config = {"data": str(images / "train"), "eval_path": str(images / "val")}
    torch.manual_seed(0)
    facts = {"arch": name, "build": {**spec.build_options, "num_classes": 3}, "classes": ["ant", "bee", "cat"]}
    state_dict = spec.build(**facts["build"]).state_dict()
    torch.save({**facts, "image_size": spec.min_size, "config": config, "state_dict": state_dict}, torch_file)
    out = run_program(ROOT / name / "demo.py", "--device=cpu", cwd=tmp_path).stdout
    assert out.count(" guess: ") == 8 and "of 8 are right" in out and "truth: cat" in out
    assert f"8 of the 21 validation images in {images / 'val'}\n" in out


def test_probabilities_by_hand(demo, images, tmp_path):
    """Logits 0, ln 2, ln 5 are 12.5 %, 25 %, 62.5 %."""
    state = SPEC.build(num_classes=3).state_dict()
    state["fc.weight"].zero_()
    state["fc.bias"].copy_(torch.from_numpy(np.log([1.0, 2, 5])))
    torch.save(state, tmp_path / "a.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    out = demo(tmp_path / "a.png", "--resume", tmp_path / "a.pth")[1]
    assert out.splitlines()[1:] == ["   62.50 %  class 2", "   25.00 %  class 1", "   12.50 %  class 0"]
