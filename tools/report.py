"""Write one HTML page about runs: curves, classes, confusions, mistakes, configuration.

    python tools/report.py output/inception_v3_train/00000
    python tools/report.py output/a output/b --out comparison.html
    python tools/report.py RUN --evaluate --grad-cam
    python tools/report.py --study study/study.json --benches docs/benchmarks.json

The page needs no network. Classes and mistakes come from RUN/predictions.csv, which --evaluate writes with the best
checkpoint, or from files of eval.py --predictions.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import shlex
import sys
import typing
from collections.abc import Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli, files, run_folder
from common.errors import UserError
from common.report import evaluation, others, page, runs, thumbnails
from common.spec import ModelSpec
from tools import models

PREDICTIONS = "predictions.csv"


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders")
    parser.add_argument(
        "--out", default="", metavar="FILE", help="page to write (default: report.html in the first RUN)"
    )
    parser.add_argument("--title", default="", help="title of the page")
    parser.add_argument(
        "--predictions", action="append", default=[], metavar="FILE", help="a file of eval.py --predictions; repeatable"
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="evaluate the best checkpoint of each RUN that has no predictions yet"
    )
    parser.add_argument(
        "--grad-cam", action="store_true", help="draw which parts of a mistake raised the guess's score"
    )
    parser.add_argument("--mistakes", type=int, default=24, metavar="N", help="mistakes to show [default 24]")
    parser.add_argument("--study", default="", metavar="FILE", help="study.json of tools/study.py")
    parser.add_argument("--benches", default="", metavar="FILE", help="docs/benchmarks.json")
    parser.add_argument("--comparison", default="", metavar="FILE", help="--json of tools/compare.py")
    parser.add_argument("--changes", default="", metavar="FILE", help="--changes of the same comparison")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="FILE", help="summary.json of an inference run; repeatable"
    )
    args = parser.parse_args()
    if args.mistakes < 0:
        raise UserError(f"--mistakes: {args.mistakes}, must be at least 0")
    if args.changes and not args.comparison:
        raise UserError("--changes: needs --comparison FILE of the same comparison")
    others_given = args.predictions or args.study or args.benches or args.comparison or args.sweep
    if not args.runs and not others_given:
        raise UserError("RUN: missing; give a run folder, or --predictions, --study, --benches, --comparison, --sweep")
    out = args.out or str(pathlib.Path(args.runs[0] if args.runs else ".") / "report.html")
    if pathlib.Path(out).suffix not in (".html", ".htm"):  # what it reads has other suffixes
        raise UserError(f"--out: {out}, must end in .html")
    with files.claimed_file(out, "--out"):
        library = page.plotting_library()
        files.write_atomic(out, page.render(content(args), library))
    print(f"{out}: {os.path.getsize(out) / 1e6:.1f} MB; open it in a browser")


def content(args: argparse.Namespace) -> dict[str, Any]:
    """The data of the page."""
    picture = functools.cache(thumbnails.of_file)
    found_runs = [_run(folder, len(args.runs)) for folder in args.runs]
    evaluations = []
    for folder, run in zip(args.runs, found_runs, strict=True):
        path = pathlib.Path(folder) / PREDICTIONS
        best = path.with_name(run_folder.BEST)
        is_old = path.exists() and best.exists() and path.stat().st_mtime_ns < best.stat().st_mtime_ns
        if args.evaluate and (is_old or not path.exists()):
            _evaluate(folder, run, path)
        elif is_old:
            print(f"note: {path} is older than {run_folder.BEST}; --evaluate makes it anew", flush=True)
        if path.exists():
            evaluations.append({**evaluation.summarize(path, args.mistakes, picture), "run": run["folder"]})
            if args.grad_cam:
                _add_heat(folder, run, evaluations[-1]["mistakes"])
    if args.grad_cam and not evaluations:
        raise UserError("--grad-cam: needs a RUN with predictions; add --evaluate")
    evaluations += [evaluation.summarize(path, args.mistakes, picture) for path in args.predictions]
    named = [pathlib.Path(folder).resolve() for folder in args.runs]
    names = ["/".join(each.parts[-2:]) for each in named] or [pathlib.Path(each).name for each in args.predictions]
    title = args.title or ", ".join(names) or "Report"
    return {
        "title": title,
        "command": shlex.join(["python", "tools/report.py", *sys.argv[1:]]),
        "runs": found_runs,
        "evaluations": evaluations,
        "study": others.study(args.study) if args.study else None,
        "benches": others.benches(args.benches) if args.benches else None,
        "comparison": others.comparison(args.comparison, args.changes, args.mistakes, picture)
        if args.comparison
        else None,
        "sweep": others.sweep(args.sweep),
    }


def _run(folder: str, num_runs: int) -> dict[str, Any]:
    run = runs.read(folder, num_runs)
    config = run["config"] or {}
    name = str(config.get("recipe"))
    arch = (run["summary"] or {}).get("arch") or config.get("arch")
    recipes = models.program(arch).recipes if arch in models.names() else {}
    recipe = dataclasses.asdict(typing.cast(Any, recipes[name].config)) if name in recipes else {}
    differs = runs.options_that_differ(config, recipe) if recipe else []
    return {**run, "differs": differs, "has_recipe": bool(recipe), "data_set": _data_set(str(arch), config)}


def _data_set(arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What there is of the images of a run: counts of `train` and `val`; empty where they are not there any more."""
    if arch not in models.names() or config.get("recipe") not in models.program(arch).recipes:
        return {}
    program = models.program(arch)
    defaults = program.recipes[config["recipe"]].config
    fields = {field.name for field in dataclasses.fields(defaults)}
    try:
        used = dataclasses.replace(defaults, **{name: value for name, value in config.items() if name in fields})
        splits = program.load_splits(used)
    except UserError:
        return {}
    return {
        part: {
            "folder": images.root,
            "images": len(images),
            "classes": list(images.classes),
            "per_class": [int((images.labels == k).sum()) for k in range(len(images.classes))],
            "ignored": images.ignored,
        }
        for part, images in (("train", splits.train), ("val", splits.val))
        if images is not None
    }


def _checkpoint(folder: str, run: dict[str, Any]) -> tuple[ModelSpec, str]:
    """The network of a run and its best checkpoint."""
    path = pathlib.Path(folder) / run_folder.BEST
    if not path.is_file():
        raise UserError(f"RUN: {folder} has no {run_folder.BEST}; --evaluate needs a run that was validated")
    config = run["config"] or {}
    return models.spec((run["summary"] or {}).get("arch") or config.get("arch") or "unknown"), str(path)


def _evaluate(folder: str, run: dict[str, Any], target: pathlib.Path) -> None:
    from common.evaluation import program

    spec, checkpoint = _checkpoint(folder, run)
    config = run["config"] or {}
    data = config.get("eval_path") or config.get("data") or ""
    if not os.path.isdir(data):
        raise UserError(
            f"--evaluate: the images of {folder} are not in {data or 'any folder'}; use eval.py --predictions"
        )
    excluded = config.get("exclude") or ""
    if excluded and not os.path.isfile(excluded):
        raise UserError(f"--evaluate: {folder} leaves out the images in {excluded}, which is not there any more")
    print(f"evaluating {checkpoint}", flush=True)
    options = program.EvalConfig(
        data=data,
        resume=checkpoint,
        predictions=str(target),
        on_bad_image="skip",
        exclude=excluded,
        label_numbers=config.get("label_numbers", "from-0"),
    )
    counts, _ = program.evaluate_folder(spec, options)
    print(counts, flush=True)


def _add_heat(folder: str, run: dict[str, Any], mistakes: list[dict[str, Any]]) -> None:
    """Grad-CAM of the guess of each mistake."""
    import numpy as np
    import torch

    from common.data import decode
    from common.data.transforms import eval_transform
    from common.evaluation.grad_cam import heat_map
    from common.weights.load import load_model

    spec, checkpoint = _checkpoint(folder, run)
    model, meta = load_model(checkpoint, spec)
    transform = eval_transform(spec, meta["image_size"])
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (spec.mean, spec.std))
    background = spec.background_columns(meta["num_classes"])
    for mistake in mistakes:
        if mistake["picture"] is None:
            continue
        pixels_HWC = transform(decode.open_rgb(mistake["path"]))
        image_CHW = (torch.tensor(np.asarray(pixels_HWC)).permute(2, 0, 1).float() / 255 - mean) / std
        heat_hw = heat_map(model, image_CHW[None], mistake["best"][0][0] + background)
        mistake["heat"] = thumbnails.of_image(thumbnails.with_heat(pixels_HWC, heat_hw))


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
