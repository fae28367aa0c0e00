"""tools/make_tables.py: tables follow the rows, and a row says where its numbers come from."""

import json
import sys

import pytest
from support import ROOT

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "bench")]

import make_tables
import record

from common.errors import UserError

MEASURED = dict(source="measured", device="H100", software="torch 2.12.0", commit="abc1234", command="make bench")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of one document with one table of Inception v4's columns."""
    monkeypatch.setattr(make_tables, "ROOT", tmp_path)
    (tmp_path / "inception_v4").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n\n<!-- table:inception_v4 -->\n<!-- /table -->\nafter\n")
    return tmp_path


def write_rows(tree, *rows):
    (tree / "inception_v4" / "results.json").write_text(json.dumps(rows))


def test_no_table_is_stale(capsys):
    assert make_tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_number_makes_the_table_stale_until_it_is_written(tree, capsys):
    rows = [dict(MEASURED, batch_size=n, fps=fps, acc1=80.0, seed=0) for n, fps in ((1, 50), (8, 300.5), (16, 299))]
    write_rows(tree, *rows)
    assert make_tables.main(["--check"]) == 1
    assert "README.md: stale" in capsys.readouterr().out
    assert (tree / "README.md").read_text().count("\n") == 5
    assert make_tables.main([]) == 0
    assert make_tables.main(["--check"]) == 0
    assert (tree / "README.md").read_text() == (
        "before\n\n<!-- table:inception_v4 -->\n"
        "| Chip | BatchSize | Top-1 | Top-5 | Images/s | Source |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| H100 | 1 | 80 % | - | 50 | measured |\n"
        "| H100 | 8 | 80 % | - | **300.5** | measured |\n"
        "| H100 | 16 | 80 % | - | 299 | measured |\n"
        "<!-- /table -->\nafter\n"
    )
    write_rows(tree, *rows[:2])
    assert make_tables.main(["--check"]) == 1


def test_the_overview_has_the_fastest_row_of_each_stage_and_device_and_the_recipes_as_they_are(tree):
    (tree / "README.md").write_text("<!-- table:overview -->\n<!-- /table -->\n")
    (tree / "inception_v4" / "README.md").write_text("# Inception v4\n\ntext\n")
    inference = [
        dict(MEASURED, stage="inference", devices=1, batch_size=n, fps=f, acc1=80.0, seed=0)
        for n, f in ((1, 9), (4, 1234.5), (8, 7))
    ]
    reported = dict(source="reported", origin="x", software="s", commit=None, command=None, epochs=250, batch_size=512)
    training = [
        dict(reported, stage="training", device="GPU", devices=8, acc1=acc1, step_ms=282) for acc1 in (78.0, 79.8)
    ]
    write_rows(tree, *inference, *training)
    study = dict(
        MEASURED, stage="study", name="probe", what="bees, 3 images", epochs=2, image_size=75, eval_size=75, seconds=1
    )
    rows = [dict(study, seed=k, acc1=90.0 + k, acc1_last=90.0, options="") for k in (0, 1)]
    rows += [dict(study, name="scratch", seed=0, acc1=50.0, acc1_last=50.0, options="--epochs=1")]
    (tree / "inception_v4" / "study.json").write_text(json.dumps(rows))
    assert make_tables.main([]) == 0
    assert (tree / "README.md").read_text().splitlines()[3:-1] == [
        "| Inception v4 | inference, batch 4 | H100 | 80 % | - | 1,234 | measured |",
        "| Inception v4 | training, 250 epochs | 8 x GPU | 79.8 % | - | 1,816 | reported |",
        "| Inception v4 | recipe probe on bees, 2 epochs | H100 | 90.5 % | - | - | measured, mean of 2 seeds |",
    ]


@pytest.mark.parametrize(
    "row, problem",
    [
        (dict(MEASURED, fps=1), "needs seed, or pairs and range"),
        (dict(MEASURED, fps=1, seed=0, commit=None), "needs commit and command"),
        (dict(MEASURED, fps=1, seed=0, source="guessed"), "must be reported or measured"),
        (dict(MEASURED, fps=1, source="reported"), "origin is missing"),
        (dict(MEASURED, seed=0), "no result"),
        (dict(MEASURED, fps="1", seed=0), "fps is '1', must be a number"),
        (dict(MEASURED, fps=1, seed=0, speed=1), "speed is no field"),
        (dict(MEASURED, fps=1, seed=0, fraction=0.8), "fraction without limit"),
        ({"fps": 1, "seed": 0}, "source is missing"),
    ],
)
def test_a_row_of_unknown_origin_is_refused(tree, row, problem):
    write_rows(tree, dict(MEASURED, fps=1, seed=0, batch_size=1), row)
    with pytest.raises(UserError, match=f"inception_v4/results.json: row 2: .*{problem}"):
        make_tables.main([])


@pytest.mark.parametrize(
    "text, problem",
    [
        ("<!-- table:inception_v4 -->\n", "<!-- /table -->"),
        ("<!-- table:v5 -->\n<!-- /table -->\n", "table:v5 is unknown"),
    ],
)
def test_a_marker_that_leads_nowhere_is_refused(tree, text, problem):
    (tree / "README.md").write_text(text)
    with pytest.raises(UserError, match=f"README.md: .*{problem}"):
        make_tables.main([])


def test_a_benchmark_replaces_its_row_of_this_machine_and_keeps_the_others(tree):
    path = tree / "docs" / "benchmarks.json"
    other = dict(MEASURED, name="run", what="running", against="walking", ratio=2.0, range=[1, 3], pairs=3)
    path.write_text(json.dumps([other]))
    for ratios in ([2.5, 1.5, 1.25], [4.0, 3.0, 3.5]):
        record.record(path, "run", "running", "walking", **record.compared(ratios))
    first, second = make_tables.read_rows("docs/benchmarks.json")
    assert first == other
    assert (second["ratio"], second["range"], second["pairs"]) == (3.5, [3.0, 4.0], 3)
    assert second["device"] == record.device() and second["software"].startswith("Python 3.")
    assert second["source"] == "measured" and second["commit"] and second["command"].startswith("python ")


def test_the_command_of_a_row_repeats_it_without_recording():
    argv = [str(ROOT / "tests" / "bench" / "bench_index.py"), "--record", "rows.json", "--rounds", "3"]
    assert record.relative(argv) == ["tests/bench/bench_index.py", "--rounds", "3"]
    assert record.relative([argv[0], "--photos", "/", "--timm-train", "/x.py"])[1:] == [
        "--photos",
        "FOLDER",
        "--timm-train",
        "FILE",
    ]
    assert record.relative([*argv[:1], "--record=rows.json"]) == ["tests/bench/bench_index.py"]
