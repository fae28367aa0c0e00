"""tools/study.py: every recipe and seed once, continued where it was interrupted; the table's mean and spread."""

import dataclasses
import json
import shlex
import shutil
import statistics

import pytest
import tiny
from support import ROOT, metrics_of

from common.config import PROBE, Recipe
from common.errors import RunError, UserError
from common.train.program import TrainProgram
from tools import make_tables, models, study

_PROBE = dataclasses.replace(tiny.RECIPE, **{**PROBE, "epochs": 5})
PROGRAM = TrainProgram(tiny.SPEC, {"default": Recipe(tiny.RECIPE), "probe": Recipe(_PROBE)}, "")


@pytest.fixture
def started(monkeypatch):
    """Options of the trainings that a study starts; the tiny network is trained in this process."""
    found = []

    def start(words, output):
        found.append(words)
        PROGRAM.main(words[1:])
        return 0

    monkeypatch.setattr(models, "program", lambda name: PROGRAM)
    monkeypatch.setattr(study, "start", start)
    return found


@pytest.fixture
def words(images, weights, tmp_path):
    """Command of a study of four runs."""
    paths = [f"--data={images}", f"--weights={weights}", f"--output={tmp_path}/study"]
    return [
        *paths,
        "--recipes=scratch,probe",
        "--seeds=2",
        "--scratch=--epochs=2 --lr=0.05",
        "--options=--print-freq=5",
    ]


def test_a_study_trains_each_recipe_with_each_seed_and_writes_their_results(words, started, images, tmp_path, capsys):
    study.main(words)
    assert [each[1:4] for each in started] == [
        ["--print-freq=5", "--epochs=2", "--lr=0.05"],
        ["--print-freq=5", "--epochs=2", "--lr=0.05"],
        ["--recipe=probe", "--print-freq=5", "--seed=0"],
        ["--recipe=probe", "--print-freq=5", "--seed=1"],
    ]
    rows = make_tables.read_rows(str(tmp_path / "study" / "study.json"))
    assert [(row["name"], row["seed"], row["epochs"]) for row in rows] == [
        ("scratch", 0, 2),
        ("scratch", 1, 2),
        ("probe", 0, 5),
        ("probe", 1, 5),
    ]
    for row in rows:
        folder = tmp_path / "study" / row["name"] / f"seed-{row['seed']}"
        tops = [record["acc1"] for record in metrics_of(folder) if record["kind"] == "val"]
        assert (row["acc1"], row["acc1_last"]) == (round(max(tops), 3), round(tops[-1], 3))
        assert json.loads((folder / "config.json").read_text())["seed"] == row["seed"]
        assert str(tmp_path) not in json.dumps(row) and str(images) not in json.dumps(row)
    command = "python inception_v3/train.py --data=DATA --pretrained=WEIGHTS --recipe=probe --print-freq=5 --seed=1"
    assert rows[3]["command"] == command and "--pretrained" not in rows[0]["command"]
    assert capsys.readouterr().out.endswith(make_tables.study_table(str(tmp_path / "study" / "study.json")).render())


def test_an_interrupted_study_continues_and_repeats_no_finished_run(words, started, tmp_path, monkeypatch):
    finished, start = [], study.start

    def interrupted(words, output):
        if len(finished) == 1:
            PROGRAM.main([*words[1:], "--max-steps=3"])
            (tmp_path / "study" / "scratch" / "seed-1" / "summary.json").unlink()
            return 143
        finished.append(words)
        return start(words, output)

    monkeypatch.setattr(study, "start", interrupted)
    with pytest.raises(SystemExit, match="143"):
        study.main(words)
    monkeypatch.setattr(study, "start", start)
    first = (tmp_path / "study" / "scratch" / "seed-0" / "checkpoint.pth.tar").stat().st_mtime_ns
    del started[:]
    study.main(words)
    assert [each[-2].rpartition("study/")[2] for each in started] == ["scratch/seed-1", "probe/seed-0", "probe/seed-1"]
    assert (tmp_path / "study" / "scratch" / "seed-0" / "checkpoint.pth.tar").stat().st_mtime_ns == first
    records = metrics_of(tmp_path / "study" / "scratch" / "seed-1")
    assert [record["step"] for record in records if record["kind"] == "val"] == [3, 5, 5]
    rows = make_tables.read_rows(str(tmp_path / "study" / "study.json"))
    del started[:]
    study.main(words)
    assert started == [] and make_tables.read_rows(str(tmp_path / "study" / "study.json")) == rows
    study.main([*words, "--recipes=probe", "--seeds=1"])  # a part of it: the other rows stay
    found = make_tables.read_rows(str(tmp_path / "study" / "study.json"))
    assert found == [rows[2], rows[0], rows[1], rows[3]]


def test_other_options_in_the_same_folder_and_failed_runs_are_errors(words, started, tmp_path, monkeypatch):
    study.main([*words, "--seeds=1", "--recipes=probe"])
    with pytest.raises(
        UserError, match="--output: .*probe/seed-0 was trained with --recipe=probe --print-freq=5 --seed=0"
    ):
        study.main([*words, "--recipes=probe", "--probe=--epochs=7"])
    with pytest.raises(UserError, match="--epochs: 0"):
        study.main([*words, "--recipes=scratch", "--scratch=--epochs=0"])
    assert not (tmp_path / "study" / "scratch").exists()
    monkeypatch.setattr(study, "start", lambda words, output: 1)
    with pytest.raises(RunError, match=r"scratch, seed 0: train.py ended with status 1; see .*scratch/seed-0.txt"):
        study.main(words)


def test_results_of_other_images_or_weights_are_not_taken_for_this_study(words, started, images, weights, tmp_path):
    words = [*words, "--seeds=1", "--recipes=probe"]
    study.main(words)
    shutil.copytree(images, tmp_path / "same")
    shutil.copy(weights, tmp_path / "same.pth")
    started.clear()
    study.main([*words, f"--data={tmp_path}/same", f"--weights={tmp_path}/same.pth"])
    assert started == []
    next((tmp_path / "same" / "val").glob("*/*")).unlink()
    with pytest.raises(UserError, match="seed-0 was trained with other names or labels of images .--data.; name"):
        study.main([*words, f"--data={tmp_path}/same"])
    with open(tmp_path / "same.pth", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="probe/seed-0 was trained with other weights .--weights.; name"):
        study.main([*words, f"--weights={tmp_path}/same.pth"])


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--recipes=scratch,full", "--recipes: full, must be of scratch, modern, finetune, probe"),
        ("--weights=", "--weights: missing, probe starts from trained weights"),
        ("--model=resnet", "--model: resnet, must be one of inception_v3"),
        ("--options=--recipe=probe", "--options: --recipe is set by this program for each run"),
        ("--options=--print-freq 5 --output-dir=x", "--options: --output-dir is set by this program"),
        ("--probe=--data x", "--probe: --data is set by this program"),
        ("--scratch=--seed 3", "--scratch: --seed is set by this program for each run; leave it out"),
    ],
)
def test_a_wrong_option_is_named(words, option, problem):
    with pytest.raises(UserError, match=problem):
        study.main([*words, option])


@pytest.mark.parametrize("model", models.names())
def test_every_model_takes_the_options_of_a_study(model):
    config = study.StudyConfig(model=model, data="D", weights="W", seeds=2, options="--device=cpu --workers=0")
    found = {}
    for run in study.runs(config):
        parsed, _ = models.program(model).parse([*run.words, *run.paths])
        found[run.recipe, run.seed] = (parsed.recipe, parsed.seed, parsed.pretrained, parsed.output_dir)
        assert parsed.data == ("D/train" if model == "xception" else "D")
        assert getattr(parsed, "eval_path", "D/val") == "D/val"
    scratch = models.program(model).default_recipe(["--device=cpu"])
    assert found["scratch", 1] == (scratch, 1, "", "study/scratch/seed-1")
    assert found["finetune", 0] == ("finetune", 0, "W", "study/finetune/seed-0")
    assert [recipe for recipe, _ in found] == [name for name in study.RECIPES for _ in range(2)]


def test_the_table_has_mean_and_spread_over_the_seeds(tmp_path):
    same = dict(stage="study", options="--epochs=4", epochs=4, image_size=96, eval_size=128, source="measured")
    same |= dict(device="cpu", software="torch", commit="abc", command="python train.py")
    tops = (90.0, 94.0, 95.0)
    rows = [
        dict(same, name="modern", seed=seed, acc1=top, acc1_last=top - 1, seconds=10.4 + seed)
        for seed, top in enumerate(tops)
    ]
    make_tables.write_rows(tmp_path / "study.json", [*rows, dict(rows[0], name="probe", options="")])
    table = make_tables.study_table(str(tmp_path / "study.json")).render().splitlines()
    deviation = statistics.stdev(tops)  # 2.6458: of a sample
    spread = f"{deviation:.2f} | 90.00 to 95.00"
    assert table[2] == f"| modern | `--epochs=4` | 4 | 96 / 128 | 3 | 93.00 % | {spread} | 92.00 % | 10 to 12 |"
    assert table[3] == "| probe | none | 4 | 96 / 128 | 1 | 90.00 % | - | 90.00 to 90.00 | 89.00 % | 10 to 10 |"


def test_the_program_answers_help_and_names_a_missing_data_set(run):
    assert "scratch (the model's first one)" in run(ROOT / "tools" / "study.py", "--help").stdout
    done = run(ROOT / "tools" / "study.py", *shlex.split("--recipes=scratch"), check=2)
    assert done.stderr.startswith("error: --data: missing")
