"""--predictions of eval.py and demo.py: the file, its rows by hand, broken images, engines, ranks."""

import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import io
import json
import os
import socket
import sys

import numpy as np
import pytest
import torch
from support import ROOT, draw_images, run_program
from tiny import SPEC

from common import files
from common.data import index
from common.data.loader import Batch
from common.deploy import export
from common.errors import UserError
from common.evaluation import predict, predictions, program
from common.evaluation.predictions import Guess, Row

NAMES = ["ant", "bee", "cat"]
ODD = 'a, "b"\r\nc\\udc9c \udc9c\\.jpg'  # the first \udc9c is seven characters, the second a byte that is no UTF-8
ROWS = [
    Row("plain.jpg", "bee", 1, (Guess("bee", 1, 0.75), Guess("background", -1, 0.25))),
    Row(f"d/{ODD}", None, None, tuple(Guess(f'k"{k}\n', k, 1e-7 * k) for k in range(5))),
    Row("torn.jpg", "ant", 0, (), 'OSError: truncated, "at" 5'),
    Row("line\rbreak.jpg", None, None, ()),
]


def written(path, rows=ROWS):
    with predictions.writer(str(path)) as write:
        for row in rows:
            write([row])
    return list(predictions.read(path))


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", predictions.FORMATS)
def test_every_row_is_read_back(tmp_path, suffix):
    assert written(tmp_path / f"p{suffix}") == ROWS
    assert written(tmp_path / f"p{suffix}", []) == []


def test_csv_is_what_other_programs_read(tmp_path):
    written(tmp_path / "p.csv")
    heading, *rows = csv.reader((tmp_path / "p.csv").read_text("utf-8").splitlines(keepends=True))
    assert heading[:6] == ["path", "label", "label_index", "class1", "index1", "probability1"]
    assert heading[-4:] == ["class5", "index5", "probability5", "error"]
    assert rows[0] == ["plain.jpg", "bee", "1", "bee", "1", "0.75", "background", "-1", "0.25", *10 * [""]]
    assert [row[-1] for row in rows] == ["", "", ROWS[2].error, ""] and {len(row) for row in rows} == {19}
    assert b"\r" not in (tmp_path / "p.csv").read_bytes().replace(b'"d/a, ""b""\r\n', b"").replace(
        b'"line\rbreak.jpg"', b""
    )


@pytest.mark.parametrize(("separator", "encoding"), [(",", "utf-8-sig"), (";", "utf-8-sig"), ("\t", "utf-16")])
def test_what_a_spreadsheet_program_saved_is_read(tmp_path, separator, encoding):
    written(tmp_path / "p.csv")
    rows = list(csv.reader((tmp_path / "p.csv").open(encoding="utf-8", newline="")))
    with (tmp_path / "p.csv").open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    assert list(predictions.read(tmp_path / "p.csv")) == ROWS


def test_json_is_a_list_of_objects(tmp_path):
    written(tmp_path / "p.json")
    plain, odd, torn, _ = json.loads((tmp_path / "p.json").read_bytes().decode("utf-8"))
    best = [dict(name="bee", index=1, probability=0.75), dict(name="background", index=-1, probability=0.25)]
    assert plain == dict(path="plain.jpg", label="bee", label_index=1, best=best, error=None)
    assert odd["path"] == 'd/a, "b"\r\nc\\udc5cudc9c \\udc9c\\.jpg' and odd["label"] is None
    assert torn["error"] == ROWS[2].error and torn["best"] == []


@pytest.mark.parametrize("suffix", predictions.FORMATS)
def test_the_file_appears_complete_or_not_at_all(tmp_path, suffix):
    path = tmp_path / "new" / f"p{suffix}"
    with pytest.raises(KeyError), predictions.writer(str(path)) as write:
        write(ROWS * 300)
        assert {file.name for file in path.parent.iterdir()} == {f"{path.name}.tmp", f"{path.name}.lock"}
        assert (path.parent / f"{path.name}.tmp").stat().st_size > 60_000  # rows do not wait for the end in memory
        raise KeyError
    assert not path.parent.exists()


def test_mistakes_are_named_before_the_work(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    for path, message in (
        ("p.txt", "p.txt, must end in .csv or .json"),
        (str(tmp_path / "folder.csv"), ".* is a folder; name a file"),
        (str(tmp_path / "file" / "p.csv"), ".*file cannot be written to; name a place elsewhere"),
    ):
        with pytest.raises(UserError, match=f"^--predictions: {message}"):
            predictions.check(path)


@pytest.mark.parametrize(
    ("suffix", "text"), [(".csv", "a,b\n1,2\n"), (".json", "[{}]"), (".json", "{"), (".csv", None)]
)
def test_other_files_are_refused(tmp_path, suffix, text):
    path = tmp_path / f"p{suffix}"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="is no file that|cannot be read"):
        list(predictions.read(path))


# ---- rows by hand ----------------------------------------------------------------------------------------------------


def batch_of(images, good, bad=()):
    labels = torch.tensor([int(images.labels[i]) for i in good])
    return Batch(torch.zeros(0), labels, torch.tensor(good), [(images.path(i), "torn") for i in bad], False, list(bad))


def test_probabilities_ties_and_order_by_hand():
    images = index.of_files(["a", "b", "c", "d"], [2, 0, 1, -1])
    builder = predictions.RowBuilder(images, NAMES)
    logits = np.log([[1, 2, 5], [1, 1, 2], [4, 1, 4]])
    rows = builder(batch_of(images, [0, 2, 3], [1]), logits)
    assert [row.path for row in rows] == ["a", "b", "c", "d"]
    assert rows[0] == Row("a", "cat", 2, (Guess("cat", 2, 0.625), Guess("bee", 1, 0.25), Guess("ant", 0, 0.125)))
    assert rows[1] == Row("b", "ant", 0, (), "torn")
    assert [row.rank for row in rows] == [0, None, 2, None]
    assert [guess.index for guess in rows[2].best] == [2, 0, 1] and rows[2].label == "bee"
    assert [guess.index for guess in rows[3].best] == [0, 2, 1] and rows[3].label is None
    assert builder(batch_of(images, [], [3]), np.zeros((0, 1))) == [Row("d", None, None, (), "torn")]


def test_a_background_column_is_the_class_minus_1():
    images = index.of_files(["a"], [1])
    (row,) = predictions.RowBuilder(images, NAMES, background=1)(batch_of(images, [0]), np.log([[4, 2, 1, 1]]))
    assert row.label == "ant" and row.label_index == 0
    assert [(g.name, g.index, g.probability) for g in row.best[:2]] == [("background", -1, 0.5), ("ant", 0, 0.25)]


# ---- eval.py ---------------------------------------------------------------------------------------------------------


def counts_in(path):
    """Hits at top-1..top-5, seen and skipped, from a predictions file alone."""
    rows = list(predictions.read(path))
    ranks = [row.rank for row in rows if not row.error]
    return (
        [sum(rank in range(k) for rank in ranks) for k in range(1, 6)],
        len(ranks),
        sum(bool(row.error) for row in rows),
    )


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Folder with val/, of 21 images two do not decode and one is in a folder below its class; a checkpoint."""
    root = tmp_path_factory.mktemp("broken")
    draw_images(root / "val", NAMES, 7, seed=1)
    (root / "val" / "bee" / "0003.jpg").write_bytes(b"")
    (root / "val" / "cat" / "0006.jpg").write_bytes((root / "val" / "cat" / "0005.jpg").read_bytes()[:500])
    (root / "val" / "ant" / "deep").mkdir()
    (root / "val" / "ant" / "0006.jpg").rename(root / "val" / "ant" / "deep" / ODD)
    torch.manual_seed(3)
    model = SPEC.build(num_classes=3)
    build = {**SPEC.build_options, "num_classes": 3}
    torch.save(
        dict(arch="tiny", state_dict=model.state_dict(), build=build, image_size=32, classes=NAMES), root / "x.pth"
    )
    return root


def evaluated(root, model, path, **options):
    options = dict(on_bad_image="skip", batch_size=4, workers=0, device="cpu") | options
    return program.evaluate_folder(
        SPEC, program.EvalConfig(data=str(root), resume=str(root / model), predictions=str(path), **options)
    )[0]


@pytest.mark.parametrize("suffix", predictions.FORMATS)
@pytest.mark.parametrize("model", ["x.pth", "x.onnx"])
def test_counts_of_the_file_are_those_of_eval(broken, tmp_path, capsys, model, suffix):
    if model == "x.onnx" and not (broken / model).exists():
        export.export(SPEC, export.ExportConfig(ckpt=str(broken / "x.pth"), onnx=str(broken / model)))
    counts = evaluated(broken, model, tmp_path / f"p{suffix}", workers=2 if model == "x.pth" else 0)
    assert counts_in(tmp_path / f"p{suffix}") == (counts.correct.tolist(), counts.seen, counts.skipped)
    assert counts.seen == 19 and 0 < counts.correct[0] < 19
    rows = list(predictions.read(tmp_path / f"p{suffix}"))
    found = index.load_folder(broken / "val")
    assert [row.path for row in rows] == [found.path(i) for i in range(21)]
    assert [row.label for row in rows] == [NAMES[label] for label in found.labels]
    assert str(broken / "val" / "ant" / "deep" / ODD) in {row.path for row in rows}
    assert [(row.label, bool(row.best)) for row in rows if row.error] == [("bee", False), ("cat", False)]
    assert capsys.readouterr().err.count("skipped: ") == 2


def test_other_names_of_the_classes(broken, tmp_path):
    (tmp_path / "names").write_text("Ameise\nBiene\nKatze\n")
    evaluated(broken, "x.pth", tmp_path / "p.csv", class_names=str(tmp_path / "names"))
    first, *_, last = predictions.read(tmp_path / "p.csv")
    assert (first.label, first.label_index, last.label) == ("Ameise", 0, "Katze")
    assert {guess.name for guess in first.best} == {"Ameise", "Biene", "Katze"}
    with pytest.raises(UserError, match="^--class-names: n, has no effect without --predictions; leave it out$"):
        program.EvalConfig(data="d", resume="x.pth", class_names="n")


def test_a_broken_image_ends_eval_without_a_file_unless_it_is_to_be_skipped(broken, tmp_path):
    with pytest.raises(UserError, match="0003.jpg: does not decode"):
        evaluated(broken, "x.pth", tmp_path / "p.csv", on_bad_image="fail")
    assert list(tmp_path.iterdir()) == []
    draw_images(tmp_path / "val", NAMES, 1)
    for path in (tmp_path / "val").glob("*/*.jpg"):
        path.write_bytes(b"")
    os.link(broken / "x.pth", tmp_path / "x.pth")
    with pytest.raises(UserError, match="^--data: none of the 3 images in .*val decodes$"):
        evaluated(tmp_path, "x.pth", tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


def test_a_full_disk_is_a_users_error(broken, tmp_path, monkeypatch):
    class Full(predictions._CsvFormat):
        def write(self, row):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(predictions, "_CsvFormat", Full)
    with pytest.raises(UserError, match=r"^--predictions: .*p.csv cannot be written \(No space left on device\)"):
        evaluated(broken, "x.pth", tmp_path / "p.csv")
    assert list(tmp_path.iterdir()) == []


RANK = f"""
import pathlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from common import cli, distributed
from tiny import PROGRAM
with cli.rank_exit_on_error():
    PROGRAM.main(sys.argv[1:])
"""


def test_several_ranks_write_one_file_in_the_order_of_the_index(broken, tmp_path):
    """21 images on 2 ranks in batches of 4: 3 batches each, the last ones of 3 and 2 images."""
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "rank.py"]
    words = ["--evaluate", "--data", broken, "--resume", broken / "x.pth", "--eval-batch-size=4", "--workers=0"]
    run_program(*torchrun, *words, "--on-bad-image=skip", "--predictions", "two.csv", cwd=tmp_path)
    evaluated(broken, "x.pth", tmp_path / "one.csv", batch_size=2)
    one, two = (list(predictions.read(tmp_path / name)) for name in ("one.csv", "two.csv"))
    assert len(two) == 21 and [_rounded(row) for row in two] == [_rounded(row) for row in one]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "rank.py", "two.csv"]


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("event", ["write", "end", "spool", "claimed"])
def test_a_disk_that_fills_up_on_one_of_two_ranks_is_one_line(broken, tmp_path, free_port, event):
    """While rank 0 merges the rows or ends the file, while rank 1 keeps its own; or another program writes the file."""
    fault = f"""
import os
def full(*args):
    raise OSError(28, "No space left on device")
from common.evaluation import predictions
if {event!r} in ("write", "end"):
    predictions._CsvFormat.{event} = full
elif {event!r} == "spool" and os.environ["RANK"] == "1":
    predictions.pickle.dump = full
"""
    (tmp_path / "rank.py").write_text(RANK.replace("with cli", f"{fault}\nwith cli"))
    words = ["--evaluate", "--data", broken, "--resume", broken / "x.pth", "--eval-batch-size=4", "--workers=0"]
    words += ["--on-bad-image=skip", "--predictions", "two.csv"]
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    claim = files.claimed(tmp_path / "two.csv", "--predictions") if event == "claimed" else contextlib.nullcontext()
    with claim, concurrent.futures.ThreadPoolExecutor(2) as pool:
        environments = [address | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
        start = functools.partial(run_program, tmp_path / "rank.py", *words, cwd=tmp_path, check=2)
        done = list(pool.map(lambda environment: start(env=environment), environments))
    lines = [line for rank in done for line in rank.stderr.splitlines() if not line.startswith("skipped: ")]
    assert len(lines) == 1 and lines[0].startswith("error: TMPDIR: " if event == "spool" else "error: --predictions: ")
    assert ("is being written by another program" if event == "claimed" else "(No space left on device)") in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["rank.py"]


def _rounded(row):
    return dataclasses.replace(row, best=tuple((g.name, g.index, round(g.probability, 4)) for g in row.best))


# ---- demo.py ---------------------------------------------------------------------------------------------------------


def test_demo_writes_a_row_for_each_image_whatever_the_depth(broken, tmp_path, monkeypatch, capsys):
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdout", output)
    words = [broken / "val", "--resume", broken / "x.pth", "--device=cpu", "--predictions"]
    for name, message in (("p.json", "IMAGE: 2 of 21 files do not decode"), ("p", "/p, must end in .csv or .json")):
        monkeypatch.setattr("sys.argv", ["demo.py", *map(str, words), str(tmp_path / name)])
        with pytest.raises(SystemExit) as end:
            predict.main(SPEC, "")
        assert end.value.code == 2 and message in capsys.readouterr().err
    output.seek(0)
    assert output.read().count(" %  ") == 19 * 3
    rows = {row.path: row for row in predictions.read(tmp_path / "p.json")}
    evaluated(broken, "x.pth", tmp_path / "e.csv")
    expected = {
        row.path: dataclasses.replace(row, label=None, label_index=None) for row in predictions.read(tmp_path / "e.csv")
    }
    assert rows.keys() == expected.keys()
    assert {path: _rounded(row) for path, row in rows.items()} == {
        path: _rounded(row) for path, row in expected.items()
    }
