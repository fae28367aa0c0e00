"""Train each recipe of a model with several seeds and compare their accuracies.

    python tools/study.py --data photos --weights torchvision
    python tools/study.py --data photos --weights FILE --options=--transform-input --modern="--epochs=8 --image-size=96"

The recipes: scratch (the model's first one), modern, finetune and probe; the last two start from --weights. Runs follow
each other, in folders OUTPUT/RECIPE/seed-N. The same command continues an interrupted study; finished runs stay.
OUTPUT/study.json has a row for each run, and the table with mean and spread is printed.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from any folder

from common import cli, files, processes, run_folder
from common.errors import RunError, UserError
from tools import make_tables, models

SCRATCH, MODERN, TUNED = "scratch", "modern", ("finetune", "probe")
RECIPES = (SCRATCH, MODERN, *TUNED)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Options of this program."""

    model: str = cli.option("inception_v3", "model to train")
    data: str = cli.option("", "folder that holds train/ and val/", required="the folder that holds train/ and val/")
    weights: str = cli.option("", "--pretrained of finetune and probe")
    recipes: str = cli.option(",".join(RECIPES), "recipes to train, separated by commas")
    seeds: int = cli.option(5, "runs of each recipe: seeds 0, 1, ...", low=1)
    output: str = cli.option("study", "folder for all runs")
    json: str = cli.option("", "file for the rows; default: study.json in --output")
    options: str = cli.option("", "options of train.py for all runs, in one quoted text")
    scratch: str = cli.option("", "the same for scratch only")
    modern: str = cli.option("", "the same for modern only")
    finetune: str = cli.option("", "the same for finetune only")
    probe: str = cli.option("", "the same for probe only")

    def __post_init__(self) -> None:
        cli.check_ranges(self)
        if self.model not in models.names():
            raise UserError(f"--model: {self.model}, must be one of {', '.join(models.names())}")
        for name in self.recipe_names:
            if name not in RECIPES:
                raise UserError(f"--recipes: {name or 'empty'}, must be of {', '.join(RECIPES)}")
            if name in TUNED and self.data and not self.weights:
                raise UserError(f"--weights: missing, {name} starts from trained weights; name a file or leave it out")

    @property
    def recipe_names(self) -> list[str]:
        return self.recipes.split(",")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      words: options of train.py without those that say where files are.
      paths: these.
      folder: run folder; a file beside it, FOLDER.json, holds `words`, hashes of the images' names and labels and of
        the weights, and the seconds that the run has taken so far.
    """

    recipe: str
    seed: int
    words: list[str]
    paths: list[str]
    folder: pathlib.Path

    @property
    def record(self) -> pathlib.Path:
        return self.folder.with_suffix(".json")

    @property
    def is_finished(self) -> bool:
        return (self.folder / run_folder.SUMMARY).exists()


def runs(config: StudyConfig) -> Iterator[Run]:
    """The runs of a study, recipe by recipe.

    Raises:
      UserError: options that train.py does not take, or folders that hold runs with other options, images or weights.
    """
    program = models.program(config.model)
    fields = type(next(iter(program.recipes.values())).config).__dataclass_fields__
    for recipe in config.recipe_names:
        root, paths = pathlib.Path(config.data), [f"{cli.flag_of(fields['data'])}={config.data}"]
        if "eval_path" in fields:  # one folder each instead of their parent
            paths = [f"{cli.flag_of(fields[name])}={root / part}" for name, part in _PARTS.items()]
        words = [] if recipe == SCRATCH else [f"--recipe={recipe}"]
        paths += [f"--pretrained={config.weights}"] if recipe in TUNED else []
        for flag in ("options", recipe):
            own = shlex.split(getattr(config, flag))
            _check_own_options(program.parse(own)[1], fields, recipe, f"--{flag}")
            words += own
        for seed in range(config.seeds):
            folder = _folder(config, recipe, seed)
            run = Run(recipe, seed, [*words, f"--seed={seed}"], [*paths, f"--output-dir={folder}"], folder)
            program.parse([*run.words, *run.paths])
            if run.record.exists():
                _check_equal(run, _recorded(run), config)
            yield run


_PARTS = {"data": "train", "eval_path": "val"}


def _check_own_options(given: frozenset[str], fields: Mapping[str, Any], recipe: str, flag: str) -> None:
    """Raise UserError for options of train.py that a study sets itself."""
    own = {*_PARTS, "pretrained", "seed", "output_dir", "resume"} | ({"recipe"} if recipe != SCRATCH else set())
    for name in sorted(own & given):
        raise UserError(f"{flag}: {cli.flag_of(fields[name])} is set by this program for each run; leave it out")


def _folder(config: StudyConfig, recipe: str, seed: int) -> pathlib.Path:
    return pathlib.Path(config.output) / recipe / f"seed-{seed}"


def _check_equal(run: Run, before: dict[str, Any], config: StudyConfig) -> None:
    """Raise UserError unless a run of this study would repeat the recorded one."""
    remedy = "name another folder or remove it"
    if before["words"] != run.words:
        raise UserError(
            f"--output: {run.folder} was trained with {shlex.join(before['words'])}, this study has "
            f"{shlex.join(run.words)}; {remedy}"
        )
    what = {"data": "names or labels of images", "weights": "weights"}
    for key, value in _hashes(config, run).items():
        if before.get(key, value) != value:  # records of an earlier version have none
            raise UserError(f"--output: {run.folder} was trained with other {what[key]} (--{key}); {remedy}")


def _hashes(config: StudyConfig, run: Run) -> dict[str, str]:
    """What a run trains on; weights by their content, a word such as "torchvision" stands for itself."""
    program = models.program(config.model)
    found = {"data": program.load_splits(program.parse([*run.words, *run.paths])[0]).summary}
    if run.recipe in TUNED:
        found["weights"] = files.sha256(config.weights) if os.path.isfile(config.weights) else config.weights
    return found


def _recorded(run: Run) -> dict[str, Any]:
    return json.loads(run.record.read_text()) if run.record.exists() else {"words": run.words, "seconds": 0.0}


def train(config: StudyConfig, run: Run) -> None:
    """Start or continue a run and wait for it; what it prints goes to FOLDER.txt.

    Raises:
      RunError: it failed.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    before, started = _recorded(run) | _hashes(config, run), time.perf_counter()
    files.write_atomic(run.record, json.dumps(before))
    with open(run.folder.with_suffix(".txt"), "a") as output:
        status = start([config.model, *run.words, *run.paths, "--resume=auto"], output)
    seconds = before["seconds"] + time.perf_counter() - started
    files.write_atomic(run.record, json.dumps({**before, "seconds": round(seconds, 1)}))
    if status in (130, 143):
        sys.exit(status)  # a signal: the same command continues
    if status:
        raise RunError(f"{run.recipe}, seed {run.seed}: train.py ended with status {status}; see {output.name}")


def start(words: Sequence[str], output: Any) -> int:
    """Exit status of `MODEL/train.py OPTIONS`; its errors are shown here."""
    command = [sys.executable, str(ROOT / words[0] / "train.py"), *words[1:]]
    ends_with_this = processes.ending_with_this(signal.SIGTERM)
    with subprocess.Popen(command, stdout=output, preexec_fn=ends_with_this) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # the terminal sends it to train.py too, which saves and ends
                return process.wait()


def row(config: StudyConfig, run: Run, commit: str) -> dict[str, Any]:
    """The row of a finished run; docs/benchmarks.md describes the fields."""
    summary, used = (json.loads((run.folder / name).read_text()) for name in (run_folder.SUMMARY, run_folder.CONFIG))
    records = [json.loads(line) for line in (run.folder / run_folder.METRICS).read_text().splitlines()]
    last = [record["acc1"] for record in records if record["kind"] == "val"][-1]
    weights = f", weights {os.path.basename(config.weights)}" if run.recipe in TUNED else ""
    paths = ["--data=DATA", *(["--pretrained=WEIGHTS"] if weights else [])]
    return dict(
        name=run.recipe,
        stage="study",
        what=f"{os.path.basename(os.path.normpath(config.data))}, {summary['val_images']} validation images{weights}",
        options=shlex.join(shlex.split(getattr(config, run.recipe))),
        seed=run.seed,
        acc1=round(summary["best_acc1"], 3),
        acc1_last=round(last, 3),
        epochs=used["epochs"],
        image_size=used["image_size"],
        eval_size=used["eval_size"] or used["image_size"],
        seconds=_recorded(run)["seconds"],
        source="measured",
        device=summary["device"],
        software=f"Python {summary['python']}, torch {summary['torch']}",
        commit=commit,
        command=shlex.join(["python", f"{config.model}/train.py", *paths, *run.words]),
    )


def main(argv: Sequence[str] | None = None) -> None:
    config, _ = cli.parse(StudyConfig(), __doc__, argv)
    target = pathlib.Path(config.json or pathlib.Path(config.output) / "study.json")
    planned = list(runs(config))
    files.make_folders(config.output, "--output")
    flag = "--json" if config.json else "--output"
    files.check_file(target, flag)
    known = _rows_before(target, flag)
    with files.claimed(config.output, "--output"):
        _train_all(config, planned, target, known)


def _train_all(
    config: StudyConfig, planned: Sequence[Run], target: pathlib.Path, known: dict[tuple[str, int], dict[str, Any]]
) -> None:
    """Train what is not finished, and write and print the rows of all runs.

    Args:
      known: rows of an earlier command, by recipe and seed.
    """
    rows, others, commit = list[dict[str, Any]](), list(known.values()), make_tables.commit()
    for run in planned:
        was_finished = run.is_finished
        if not was_finished:
            train(config, run)
        made = row(config, run, commit)
        if was_finished and (old := known.get((run.recipe, run.seed))):
            made["commit"] = old["commit"]
        rows.append(made)
        print(
            f"{run.recipe}, seed {run.seed}: {made['acc1']:.3f} %, last epoch {made['acc1_last']:.3f} %, "
            f"{made['seconds']:.0f} s{', finished before' if was_finished else ''}",
            flush=True,
        )
        known.pop((run.recipe, run.seed), None)
        # Rows of runs that an earlier command asked for stay while their folders do.
        others = [each for (recipe, seed), each in known.items() if _folder(config, recipe, seed).exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        make_tables.write_rows(target, rows + others)
    print(f"{target}: {len(rows + others)} runs\n\n{make_tables.study_table(str(target.resolve())).render()}", end="")


def _rows_before(target: pathlib.Path, flag: str) -> dict[tuple[str, int], dict[str, Any]]:
    """(recipe, seed) -> its row in the file of an earlier command.

    Raises:
      UserError: another file, which would be overwritten.
    """
    try:
        return {(each["name"], each["seed"]): each for each in json.loads(target.read_text())}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{flag}: {target} exists and holds no rows of a study; name another file") from error


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
