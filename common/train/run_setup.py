"""A training run whose every input was checked, and the checks, the checkpoint's word against the user's."""

import dataclasses
import os
import pathlib

from common import cli, run_folder
from common.config import TrainConfig
from common.data import index, sampling
from common.errors import UserError
from common.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Job:
    """A run whose every input was checked.

    Attributes:
      spec, config: as given.
      splits: index.Splits.
      plan: order.StepPlan.
      build_options: arguments of spec.build, class count included.
      memory_format: word of --memory-format, the checkpoint's where the user gave none.
      state: content of the checkpoint to resume from, or None.
      weights: state dict of --pretrained, or None.
      folder: run folder, or None until it is known (and on ranks other than 0).
      schedules: the model's own learning-rate schedules by name.
      first_epoch: epoch to begin with, counted from 0, where there is no `state`.
    """

    spec: ModelSpec
    config: TrainConfig
    splits: index.Splits
    plan: sampling.StepPlan
    build_options: dict
    memory_format: str
    state: dict | None = None
    weights: dict | None = None
    folder: pathlib.Path | None = None
    schedules: dict | None = None
    first_epoch: int = 0


# Options that may differ from machine to machine: where things are, and how fast they are read.
_OWN_TO_A_MACHINE = ("data", "exclude", "workers", "output_dir", "resume", "pretrained")


def options_of(config):
    values = dataclasses.asdict(config)
    return {cli.flag_of(f): values[f.name] for f in dataclasses.fields(config) if f.name not in _OWN_TO_A_MACHINE}


def common_facts(job):
    """What all machines of a run must have alike: images, place to continue at, options."""
    at = "the beginning" if job.state is None else f"epoch {job.state['epoch'] + 1} step {job.state['step']}"
    val = job.splits.val
    return {
        "--data, train/": f"{len(job.splits.train)} images, fingerprint {job.splits.train.fingerprint}",
        "--data, val/": None if val is None else f"{len(val)} images, fingerprint {val.fingerprint}",
        "--resume": at,
        **options_of(job.config),
    }


def resumed_state(config, run_name):
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
    missing = [key for key in ("arch", "build", "optimizer", "epoch", "step") if key not in state]
    if missing:
        raise UserError(
            f"--resume: {config.resume} is no checkpoint of a run (it lacks {', '.join(missing)}); "
            "--pretrained takes weights alone"
        )
    return state


def _newest_run(run_name):
    found = run_folder.numbered_runs(run_folder.OUTPUT / run_name)
    return found[-1] if found else None


def class_count(config, explicit, splits, state):
    """Number of classes: --num-classes, else the checkpoint's, else the folders'."""
    folders = len(splits.classes)
    count = config.num_classes or folders
    if state is not None:
        stored = state["build"]["num_classes"]
        if "num_classes" in explicit and config.num_classes != stored:
            raise UserError(f"--num-classes: {config.num_classes}, but {config.resume} was trained with {stored}")
        count = stored
    if count < folders:
        raise UserError(f"--num-classes: {count}, but train/ has {folders} class folders")
    return count


def agree_with_checkpoint(spec, config, explicit, state, splits):
    """Take class count, image size and build options from the checkpoint; contradicting flags are errors."""
    where = f"the checkpoint (--resume {config.resume})"
    if state["arch"] != spec.name:
        raise UserError(f"--resume: {config.resume} holds a {state['arch']}, this script trains {spec.name}")
    for name in explicit & set(state["build"]):
        if (
            name != "num_classes"
            and getattr(config, name) is not None
            and getattr(config, name) != state["build"][name]
        ):
            raise UserError(
                f"--{name.replace('_', '-')}: {getattr(config, name)}, but {where} has {state['build'][name]}"
            )
    for name in ("image_size", "seed"):
        stored = state["image_size"] if name == "image_size" else state["config"]["seed"]
        if name in explicit and getattr(config, name) != stored:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(config, name)}, but {where} has {stored}")
        config = dataclasses.replace(config, **{name: stored})
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


def step_plan(config, num_images, world_size, machines, state, global_batch):
    """How a step is cut into micro-batches; a resumed run keeps its micro-batches for any number of ranks."""
    if state is not None:
        plan = sampling.StepPlan(num_images, state["num_micro_batches"], state["micro_batch_size"])
        if plan.global_batch_size != global_batch:
            raise UserError(
                f"--batch-size: {config.batch_size} on {machines} machine(s) is {global_batch} images per step, "
                f"but the checkpoint (--resume {config.resume}) has {plan.global_batch_size}"
            )
    else:
        num_micro_batches = world_size * config.accumulate
        if global_batch % num_micro_batches:
            raise UserError(
                f"--batch-size: {config.batch_size}, must be divisible by {num_micro_batches // machines} "
                f"({world_size // machines} devices x --accumulate {config.accumulate})"
            )
        plan = sampling.StepPlan(num_images, num_micro_batches, global_batch // num_micro_batches)
    if plan.steps_per_epoch < 1:
        raise UserError(
            f"--batch-size: a step takes {plan.global_batch_size} images, but train/ holds {num_images}; use fewer"
        )
    if plan.micro_batch_size < 2:
        raise UserError(
            f"--batch-size: {config.batch_size} leaves one image per micro-batch; batch norm needs at least 2"
        )
    return plan


def refuse_used_folder(folder):
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--output-dir: {folder} is not a folder")
    if run_folder.holds_run(folder):
        raise UserError(
            f"--output-dir: {folder} already holds a run; choose another folder, or continue it with --resume auto"
        )


def create_folder(job):
    """The run folder, on rank 0: the one given, the one that is resumed, or a new numbered one."""
    config = job.config
    if config.output_dir:
        try:
            os.makedirs(config.output_dir, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output-dir: {config.output_dir} cannot be created ({error.strerror})", every_rank=False
            ) from error
        return pathlib.Path(config.output_dir)
    parent = run_folder.OUTPUT / (config.run_name or f"{job.spec.name}_train")
    if job.state is not None and config.resume == "auto":
        return _newest_run(parent.name)
    return run_folder.new_run(parent)
