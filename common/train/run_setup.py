"""RunSetup: the checked inputs of a training run, and the checks, which reconcile options with the checkpoint."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common import cli, files, run_folder
from common.config import AUTO, Recipe, TrainConfig
from common.data import file_tree, index, sampling
from common.errors import UserError
from common.spec import ModelSpec
from common.weights.convert import destinations


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """The checked inputs of a run, equal on all ranks except for `folder`.

    Attributes:
      plan: how the images of a step are cut into micro-batches.
      build_options: arguments of spec.build, class count included.
      memory_format: value of --memory-format, the checkpoint's where the user gave none.
      lr_at: (epoch, step) -> learning rate, both counted from 0.
      state: content of the checkpoint to resume from.
      weights: state dict of --pretrained.
      folder: run folder; None until it is created.
      first_epoch: epoch to begin with, counted from 0, where there is no `state`.
      finds_batch_size: --batch-size auto: `plan` has the smallest micro-batches until tuner.micro_batch_size ran.
      found: options whose values were found before the first step, by name of their field.
      finished: why nothing is left to do, in one line; empty for a run that goes on.
      notes: what was found while preparing; the function `notes` adds to it.
    """

    spec: ModelSpec
    config: TrainConfig
    splits: index.Splits
    plan: sampling.StepPlan
    build_options: Mapping[str, Any]
    memory_format: str
    lr_at: Callable[[int, int], float]
    state: dict[str, Any] | None = None
    weights: Mapping[str, Any] | None = None
    folder: pathlib.Path | None = None
    first_epoch: int = 0
    finds_batch_size: bool = False
    found: Mapping[str, float] = dataclasses.field(default_factory=dict)
    finished: str = ""
    notes: tuple[str, ...] = ()


SMALLEST_MICRO_BATCH = 2  # images; batch norm needs them
# Options that may differ between machines: where files are, and how fast they are read.
_PER_MACHINE = ("data", "exclude", "workers", "output_dir", "resume", "pretrained")


# Options that a resumed run takes from its checkpoint: the order of images and the parameters of the optimizer.
_KEPT_ON_RESUME = ("seed", "repeated_aug", "freeze", "freeze_norm", "cache_features", "head_lr_scale")

# Options of the start of a run, which a resumed run does not use.
_OF_THE_START = ("accumulate", "pretrained", "head_init")

# What to do where an option contradicts the checkpoint of a resumed run.
_NEW_RUN = "keep it, or start a new run from these weights with --pretrained FILE instead of --resume"


def shared_options(config: TrainConfig) -> dict[str, Any]:
    """{flag: value} of the options that all machines of a run must share."""
    fields = [field for field in dataclasses.fields(config) if field.name not in _PER_MACHINE]
    return {cli.flag_of(field): getattr(config, field.name) for field in fields}


def shared_facts(setup: RunSetup) -> dict[str, Any]:
    """{name: value} that all machines of a run must share: images, position to resume at, options."""
    state, splits = setup.state, setup.splits
    at = "the beginning" if state is None else f"epoch {state['epoch'] + 1} step {state['step']}"
    val = None if splits.val is None else f"{len(splits.val)} images, fingerprint {splits.val.fingerprint}"
    return {
        "--data, train/": f"{len(splits.train)} images, fingerprint {splits.train.fingerprint}",
        "--data, val/": val,
        "--resume": at,
        **shared_options(setup.config),
    }


def load_resume_state(config: TrainConfig, run_name: str) -> dict[str, Any] | None:
    """Content of the checkpoint that --resume names, or None for a fresh start."""
    if not config.resume:
        return None
    from common.train import checkpoint
    from common.weights.load import load_torch

    if config.resume != "auto":
        if not os.path.isfile(config.resume):
            raise UserError(f"--resume: {config.resume} is not a file")
        state = load_torch(config.resume)
    else:
        folder = config.output_dir or _newest_run(run_name)
        found = checkpoint.newest_valid(folder) if folder and os.path.isdir(folder) else None
        if found is None:
            return None
        state = found[1]
    needed = ("arch", "build", "optimizer", "epoch", "step")
    missing = [key for key in needed if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise UserError(
            f"--resume: {config.resume} is no checkpoint of a run (it lacks {', '.join(missing)}); "
            "--pretrained takes weights alone"
        )
    return state


def finished(config: TrainConfig, state: dict[str, Any], plan: sampling.StepPlan, run_name: str, machines: int) -> str:
    """One line on a run that its checkpoint has completed, or an empty text.

    With --resume auto the summary of the run must be there too: a run that was killed before it wrote its summary is
    resumed to write it. Where there are several machines, the others have no summary, and the checkpoint alone decides.
    """
    steps = state["epoch"] * plan.steps_per_epoch + state["step"]
    by_steps = config.max_steps is not None and steps >= config.max_steps
    if state["epoch"] < config.epochs and not by_steps:
        return ""
    where = config.resume
    if config.resume == "auto":
        folder = pathlib.Path(config.output_dir or _newest_run(run_name) or "")
        where = str(folder)
        if machines == 1:
            try:
                summary = json.loads((folder / run_folder.SUMMARY).read_text())
            except (OSError, ValueError):
                return ""
            if summary.get("steps", steps) != steps:  # of a run of fewer epochs, which was continued
                return ""
    field = "epochs" if state["epoch"] >= config.epochs else "max_steps"
    flag, asked = cli.flag_of(type(config).__dataclass_fields__[field]), getattr(config, field)
    best = state["best_epoch"]
    accuracy = f", best validation top-1 {state['best_acc1']:.3f} % in epoch {best}" if best else ""
    return (
        f"nothing is left to do: {where} has completed {state['epoch']} epochs ({steps} steps){accuracy}, and {flag} "
        f"is {asked}; a larger {flag} continues it"
    )


def changed_options(config: TrainConfig, state: dict[str, Any]) -> list[str]:
    """One line on the options that differ from those of the checkpoint and take effect, or none."""
    changes = [
        f"{cli.flag_of(field)} is {getattr(config, field.name)}, before {state['config'][field.name]}"
        for field in dataclasses.fields(config)
        if field.metadata["group"] != "run"
        and field.name not in config.NOT_COMPARED_ON_RESUME
        and state["config"].get(field.name, getattr(config, field.name)) != getattr(config, field.name)
    ]
    return [f"note: --resume: {'; '.join(changes)}; the run continues with the new values"] if changes else []


def ignored_options(config: TrainConfig, explicit: frozenset[str], state: dict[str, Any]) -> list[str]:
    """One line on given options that have no effect in a resumed run and differ from the checkpoint's, or none."""
    flags = [
        cli.flag_of(config.__dataclass_fields__[name])
        for name in _OF_THE_START
        if name in explicit and getattr(config, name) != state["config"].get(name)
    ]
    if not flags:
        return []
    return [f"note: --resume: no effect of {', '.join(flags)}; weights and micro-batches are those of the checkpoint"]


def keep_found(
    config: TrainConfig, explicit: frozenset[str], state: dict[str, Any] | None
) -> tuple[TrainConfig, dict[str, float]]:
    """(config with the values that the run of a checkpoint found before its first step, these values).

    Raises:
      UserError: --lr-find beside a learning rate that is given or that of the checkpoint.
    """
    lr_flag = cli.flag_of(type(config).__dataclass_fields__["lr"])
    if config.lr_find and "lr" in explicit:
        raise UserError(f"--lr-find: finds {lr_flag}, which is given ({config.lr:g}); leave one of them out")
    if state is None:
        return config, {}
    found: dict[str, float] = dict(state.get("found", {}))
    if config.lr_find and "lr" not in found:
        raise UserError(f"--lr-find: {config.resume} was trained with {lr_flag} {state['config']['lr']:g}; {_NEW_RUN}")
    kept = {name: value for name, value in found.items() if name not in explicit}
    if config.batch_size == AUTO:
        kept["batch_size"] = state["config"]["batch_size"]
    return dataclasses.replace(config, **kept), found  # type: ignore[arg-type]  # batch_size is an int


def _newest_run(run_name: str) -> pathlib.Path | None:
    found = run_folder.numbered_runs(run_folder.OUTPUT / run_name)
    return found[-1] if found else None


def class_count(
    config: TrainConfig, explicit: frozenset[str], splits: index.Splits, state: dict[str, Any] | None
) -> int:
    """Number of classes: --num-classes, else the checkpoint's, else the number of class folders."""
    folders = len(splits.classes)
    count = config.num_classes or folders
    if state is not None:
        stored = state["build"]["num_classes"]
        if "num_classes" in explicit and config.num_classes != stored:
            raise UserError(
                f"--num-classes: {config.num_classes}, but {config.resume} was trained with {stored}; {_NEW_RUN}"
            )
        count = stored
    if count < folders:
        raise UserError(f"--num-classes: {count}, but train/ has {folders} class folders")
    if count < 2:
        flag = cli.flag_of(type(config).__dataclass_fields__["data"])
        raise UserError(f"{flag}: {splits.train.root} {file_tree.only_class(splits.train.root, splits.classes)}")
    return count


def reconcile_with_checkpoint(
    spec: ModelSpec, config: TrainConfig, explicit: frozenset[str], state: dict[str, Any], splits: index.Splits
) -> tuple[TrainConfig, dict[str, Any]]:
    """Take image sizes, seed, frozen parts and build options from the checkpoint; contradicting options are errors.

    Returns:
      (config, build options).
    """
    where = f"the checkpoint (--resume {config.resume})"
    if state["arch"] != spec.name:
        raise UserError(f"--resume: {config.resume} holds {state['arch']}, this script trains {spec.name}")
    stored = {**spec.build_options, **state["build"]}
    del stored["num_classes"]
    stored |= {"image_size": state["config"].get("image_size", state["image_size"]), "eval_size": state["image_size"]}
    stored |= {name: state["config"].get(name, getattr(TrainConfig, name)) for name in _KEPT_ON_RESUME}
    for name in sorted(explicit & stored.keys()):
        given = getattr(config, name)
        if given is not None and given != stored[name]:
            raise UserError(f"--{name.replace('_', '-')}: {given}, but {where} has {stored[name]}; {_NEW_RUN}")
    _check_optimizer(config, explicit, state, where)
    kept = {name: stored[name] for name in ("image_size", *_KEPT_ON_RESUME)}
    config = dataclasses.replace(config, **kept, eval_size=state["config"].get("eval_size"))
    if state["data_fingerprint"] != splits.train.fingerprint:
        if state.get("folder_fingerprint") == splits.train.full_fingerprint:
            raise UserError(
                f"--exclude: {config.exclude or 'no list'} leaves {len(splits.train)} images, but {where} was trained "
                f"on {state['num_images']} of this folder (--exclude {state['config']['exclude'] or 'not given'}); "
                "give the same list, or start anew with --pretrained"
            )
        raise UserError(
            f"--data: train/ does not hold the images that {where} was trained on ({len(splits.train)} images "
            "now); the order of images would differ; restore the folder, or start anew with --pretrained"
        )
    return config, dict(state["build"])


def _check_optimizer(config: TrainConfig, explicit: frozenset[str], state: dict[str, Any], where: str) -> None:
    """Raise UserError for another optimizer than the checkpoint's, whose state it cannot use."""
    before = state["config"].get("optimizer", config.optimizer)
    if config.optimizer == before:
        return
    recipe = state["config"].get("recipe", config.recipe)
    by_recipe = "optimizer" not in explicit and recipe != config.recipe
    of, remedy = (f" (--recipe {config.recipe})", f"give --recipe {recipe}") if by_recipe else ("", _NEW_RUN)
    raise UserError(f"--optimizer: {config.optimizer}{of}, but {where} has {before}; {remedy}")


def forget_best(state: dict[str, Any], val: index.FolderIndex | None) -> list[str]:
    """Forget the best epoch of a checkpoint whose accuracy is that of other images; one line that says so, or none."""
    before = state.get("val_fingerprint")  # earlier versions stored none
    if before is None or val is None or before == val.fingerprint:
        return []
    state |= {"best_acc1": 0.0, "best_epoch": None}
    return ["note: --resume: val/ holds other images than before; the best epoch is chosen anew from here on"]


def order_notes(config: TrainConfig, state: dict[str, Any], plan: sampling.StepPlan) -> list[str]:
    """One line where a run goes on with another order of images than it began with, or none.

    Raises:
      UserError: within an epoch, in which images would be missing and others come twice.
    """
    version = state.get("order_version", 1)
    if version == sampling.ORDER_VERSION:
        return []
    where = f"--resume: {config.resume} is of a version of this program that orders images in another way"
    if state["step"] % plan.steps_per_epoch:
        raise UserError(
            f"{where}, and ends at step {state['step']} of {plan.steps_per_epoch} of epoch {state['epoch'] + 1}; "
            "finish that epoch with that version, or start a new run from these weights with --pretrained FILE"
        )
    return [f"note: {where}; the epochs from here on have the new order"]


def step_plan(
    config: TrainConfig,
    num_images: int,
    world_size: int,
    machines: int,
    state: dict[str, Any] | None,
    global_batch: int,
) -> sampling.StepPlan:
    """How a step is cut into micro-batches; a resumed run keeps its micro-batches for any number of ranks."""
    if config.cache_features:
        return sampling.StepPlan(num_images, 1, num_images)
    if state is not None:
        micro_batches = state["num_micro_batches"], state["micro_batch_size"]
        plan = sampling.StepPlan(num_images, *micro_batches, config.repeated_aug)
        if plan.global_batch_size != global_batch:
            raise UserError(
                f"--batch-size: {config.batch_size} on {machines} machine(s) is {global_batch} images per step, "
                f"but the checkpoint (--resume {config.resume}) has {plan.global_batch_size}; {_NEW_RUN}"
            )
    else:
        num_micro_batches = world_size * config.accumulate
        if global_batch % num_micro_batches:
            raise UserError(
                f"--batch-size: {config.batch_size}, must be divisible by {num_micro_batches // machines} "
                f"({world_size // machines} devices x --accumulate {config.accumulate})"
            )
        size = global_batch // num_micro_batches
        plan = sampling.StepPlan(num_images, num_micro_batches, size, config.repeated_aug)
    if plan.steps_per_epoch < 1:
        raise UserError(
            f"--batch-size: a step takes {plan.global_batch_size} images, but train/ holds {num_images}; use fewer"
        )
    if plan.micro_batch_size < SMALLEST_MICRO_BATCH:
        raise UserError(
            f"--batch-size: {config.batch_size} leaves one image per micro-batch; batch norm needs at least 2"
        )
    return plan


def note_on_lr(recipe: Recipe, config: TrainConfig, explicit: frozenset[str], images_per_step: int) -> list[str]:
    """One line where SGD's learning rate is the recipe's and the steps have half or twice as many images, or none.

    The rate in proportion to the images: Goyal et al., https://arxiv.org/abs/1706.02677, section 2.1.
    """
    factor = images_per_step / recipe.images_per_step
    if "lr" in explicit or config.lr_find or config.cache_features or config.optimizer != "sgd" or 0.5 < factor < 2:
        return []
    flag = cli.flag_of(type(config).__dataclass_fields__["lr"])
    return [
        f"note: {flag} is {config.lr:g}, that of recipe {config.recipe} for steps of {recipe.images_per_step} images; "
        f"steps of this run have {images_per_step}; in proportion it would be {flag}={config.lr * factor:.3g}"
    ]


def notes(setup: RunSetup) -> list[str]:
    """One line for each thing in a run that is allowed and may not be meant; printed below its first line."""
    splits, plan, found = setup.splits, setup.plan, list(setup.notes)
    for index_ in (splits.train, splits.val):
        kinds = file_tree.describe_ignored(index_.ignored_kinds) if index_ is not None else ""
        if index_ is not None and kinds:
            found.append(f"note: ignored in {index_.root}: {kinds}")
    outputs, folders = setup.build_options["num_classes"], len(splits.classes)
    if outputs > folders and setup.state is None:
        found.append(
            f"note: --num-classes is {outputs}, but {splits.train.root} has {folders} class folders: "
            f"{outputs - folders} outputs have no images; give --num-classes={folders} to train one output per folder"
        )
    if plan.repeats > 1:
        found.append(
            f"note: --repeated-aug {plan.repeats}: an epoch takes {plan.images_per_epoch} of the {plan.num_images} "
            f"images, others in every epoch, {plan.repeats} times each"
        )
    elif left := plan.num_images % plan.global_batch_size:
        found.append(
            f"note: an epoch takes {plan.num_images - left} of the {plan.num_images} images; the {left} that do not "
            f"fill a step of {plan.global_batch_size} are dropped, others in every epoch"
        )
    if setup.state is None and (line := destinations(setup.spec, setup.build_options, setup.config.evaluation_size)):
        found.append(line)
    return found


def refuse_used_folder(folder: str) -> None:
    """Raise UserError where --output-dir already holds a run."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--output-dir: {folder} is not a folder")
    if run_folder.holds_run(folder):
        kept = (*run_folder.CHECKPOINTS, run_folder.SUMMARY)
        is_kept = any(os.path.exists(f"{folder}/{name}") for name in kept)
        text = "continue it" if is_kept else "start it again there, as it has no checkpoint,"
        raise UserError(
            f"--output-dir: {folder} already holds a run; choose another folder, or {text} with --resume auto"
        )


@contextlib.contextmanager
def claimed_folder(setup: RunSetup) -> Iterator[pathlib.Path]:
    """The run folder, on rank 0: the one given, the one that is resumed, or a new numbered one.

    It belongs to this process until the end of the block, by the kernel's lock on log.txt; where a file system has no
    locks, the creation of log.txt still decides between two new runs.

    Raises:
      UserError: another process has it, or it cannot be written.
    """
    folder, resumes = _folder(setup), setup.config.resume == "auto"
    try:
        log = open(folder / run_folder.LOG, "a" if resumes or setup.state else "x")  # noqa: SIM115  closed below
    except FileExistsError:
        refuse_used_folder(str(folder))
        raise
    except OSError as error:
        raise UserError(f"--output-dir: {folder} cannot be written ({error.strerror})") from error
    with log:
        # The lock of a node that was lost may stay in a network file system; there the rendezvous keeps runs apart.
        if not files.lock(log) and not setup.config.machines:
            reason = f"{folder} is in use by another run; choose another folder, or wait for its end"
            raise UserError(f"--output-dir: {reason}")
        if resumes and setup.state is None:
            from common.train import checkpoint

            if checkpoint.newest_valid(folder):  # a run that started and ended since `load_resume_state`
                refuse_used_folder(str(folder))
        yield folder


def _folder(setup: RunSetup) -> pathlib.Path:
    """The folder of a run, which exists."""
    config = setup.config
    if config.output_dir:
        files.make_folders(config.output_dir, "--output-dir")
        return pathlib.Path(config.output_dir)
    parent = run_folder.OUTPUT / (config.run_name or f"{setup.spec.name}_train")
    newest = _newest_run(parent.name)
    if setup.state is not None and config.resume == "auto" and newest is not None:
        return newest
    return run_folder.new_run(parent)
