"""tools/quickstart.py: the stages of `make demo`, with the programs replaced."""

import pathlib

from tools import quickstart


def test_the_demo_ends_with_a_report_of_its_evaluation(tmp_path, monkeypatch):
    """The report takes the predictions that the evaluation of the checkpoint wrote: nothing is evaluated twice."""
    started, tables = [], []
    monkeypatch.setattr(quickstart, "run", lambda script, *options: started.append([script, *map(str, options)]))
    monkeypatch.setattr(quickstart, "print_table", lambda *paths: tables.append(paths))
    monkeypatch.setattr("sys.argv", ["quickstart.py", f"--folder={tmp_path}"])
    quickstart.main()
    run = tmp_path / "00000" / "run"
    evaluations = [words for words in started if words[0] == "inception_v3/eval.py"]
    written = [word for words in evaluations for word in words if word.startswith("--predictions=")]
    assert written == [f"--predictions={run / 'predictions.csv'}"] and len(evaluations) == 2
    assert started[-1][:3] == ["tools/report.py", str(run), f"--out={tmp_path / '00000' / 'report.html'}"]
    assert len(tables) == 1


def test_without_the_library_of_the_report_the_demo_goes_on(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(quickstart, "run", lambda script, *options: started.append(script))
    monkeypatch.setattr(quickstart, "top1", lambda path: "95.00%")
    monkeypatch.setattr(quickstart, "largest_difference", lambda *paths: 0.0)
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: '{"images_per_s": 1.0, "device": "cpu"}')
    monkeypatch.setattr("sys.argv", ["quickstart.py", f"--folder={tmp_path}"])
    quickstart.main()
    assert "tools/report.py" not in started
    assert "needs vl-convert-python" in capsys.readouterr().out
