"""The training program of a model: command line -> checked Job -> Trainer.

A model's train.py binds its spec and recipe: `PROGRAM = TrainProgram(SPEC, RECIPE, __doc__)`. common/launch.py calls
`PROGRAM.check` once before any process exists; every process then calls `PROGRAM.main`. torch is imported only after
the command line has been read, so that --help and mistakes answer at once.
"""

import dataclasses
import os
import pathlib

from common import cli
from common.config import TrainConfig
from common.data import exclude, index, order
from common.errors import UserError
from common.spec import ModelSpec
from common.train import report, runs, schedules


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
    plan: order.StepPlan
    build_options: dict
    memory_format: str
    state: dict | None = None
    weights: dict | None = None
    folder: pathlib.Path | None = None
    schedules: dict | None = None
    first_epoch: int = 0


class TrainProgram:
    """Command line and checks of one model's training.

    Args:
      spec: ModelSpec.
      recipe: TrainConfig with the model's defaults.
      description: docstring of the script, shown by --help.
      schedules: further learning-rate schedules by name, as in common/train/schedules.py.
      make_report: called with the run folder (or None on silent ranks), returns a report.Report.
      load_data: called with the config, returns index.Splits.
    """

    def __init__(self, spec, recipe, description, schedules=None, make_report=report.Report, load_data=None):
        self.spec, self.recipe, self.description = spec, recipe, description
        self.schedules, self.make_report = schedules, make_report
        self.load_data = load_data or _load_splits

    def parse(self, argv=None):
        """(config, names of the fields the user gave)."""
        config, explicit = cli.parse(self.recipe, self.description, argv)
        if config.arch and config.arch not in (self.spec.name, self.spec.name.replace("_", "")):
            raise UserError(f"--arch: {config.arch}, this script trains {self.spec.name}")
        self.spec.check_image_size(config.image_size)
        return config, explicit

    def check(self, argv, world_size=1, machines=1):
        """Check everything that can be checked before a process starts, for `world_size` ranks on `machines`.

        Returns:
          {name: value} of everything that all machines of the run must have alike; a flag, or words for the rest.
        Raises:
          UserError: the first mistake.
        """
        from common import device as devices

        config, explicit = self.parse(argv)
        last = world_size // machines - 1
        device = devices.choose(config.device_kind, config.device_index if world_size == 1 else last)
        device.check(config)
        if config.evaluate:
            from common.deploy import stream
            from common.distributed import World

            stream.prepare(self.spec, self.evaluation(config, explicit), device, World())
            return _options_of(config)
        return _common_facts(self._prepare(config, explicit, world_size, machines))

    def prepare(self, argv=None):
        """The checked Job of a single-process run, without a run folder; for programs that drive the Trainer."""
        return self._prepare(*self.parse(argv), world_size=1, machines=1)

    def main(self, argv=None):
        """Train (or, with --evaluate, evaluate) in this process; ends it with the documented exit status."""
        with cli.rank_exits():
            config, explicit = self.parse(argv)
            from common import device as devices
            from common import distributed

            world = distributed.world_from_environment()
            if config.evaluate:
                self._evaluate(config, explicit, world)
                return
            device = devices.choose(config.device_kind, world.local_rank if world.size > 1 else config.device_index)
            device.activate()
            device.check(config)
            if config.full_fp32:
                device.compute_float32_exactly()
            group = distributed.Group(world, device, config.rendezvous_timeout)
            job = group.in_turn(lambda: self._prepare(config, explicit, world.size, world.machines))
            group.check_same(job.splits.summary, "--data")
            self._train(job, world, device, group)
            group.close()

    def _train(self, job, world, device, group):
        from common.distributed import losses_explained
        from common.train.trainer import Trainer

        folder = group.from_main(_create_folder(job) if world.is_main else None)
        job = dataclasses.replace(job, folder=folder)
        say = self.report(folder if world.is_main else None, job)
        try:
            say.write(
                report.CONFIG,
                dict(
                    dataclasses.asdict(job.config),
                    arch=self.spec.name,
                    ranks=world.size,
                    num_micro_batches=job.plan.num_micro_batches,
                    build=job.build_options,
                ),
            )
            trainer = Trainer(job, world, device, group, say)
            try:
                say.line(_headline(job, trainer, device, world))
                with losses_explained():
                    trainer.fit()
            finally:
                trainer.close()
        finally:
            say.close()

    def _evaluate(self, config, explicit, world):
        from common.deploy import stream

        counts, _ = stream.evaluate_stream(self.spec, self.evaluation(config, explicit), world=world)
        if world.is_main:
            print(counts)

    def evaluation(self, config, explicit):
        """--evaluate as a configuration of the evaluation that eval.py does."""
        from common.deploy.stream import StreamConfig

        return StreamConfig(
            data=config.data,
            resume=config.resume or config.pretrained,
            device=config.device_kind,
            device_id=config.device_index,
            batch_size=config.eval_batch_size,
            exclude=config.exclude,
            workers=config.workers,
            threads=config.threads or 0,
            num_classes=config.num_classes if "num_classes" in explicit else None,
            image_size=config.image_size if "image_size" in explicit else None,
            transform_input=config.transform_input,
        )

    def _prepare(self, config, explicit, world_size, machines):
        """Everything that is the same on all ranks, checked: a Job without its folder."""
        state = _resumed_state(config, self.name_of_run(config))
        splits = self.load_data(config)
        num_classes = _class_count(config, explicit, splits, state)
        build_options = {**self.spec.build_options, **self._build_options(config, explicit), "num_classes": num_classes}
        if state is not None:
            config, build_options = _agree_with_checkpoint(self.spec, config, explicit, state, splits)
        # Machines may come and go: the plan of a step is made for all that could take part.
        planned = config.machines or machines
        planned_ranks = world_size // machines * planned
        global_batch = self.global_batch(config, explicit, state, planned_ranks, planned)
        plan = _step_plan(config, len(splits.train), planned_ranks, planned, state, global_batch)
        plan.check_world_size(world_size)
        schedules.make(config, plan.steps_per_epoch, self.schedules)
        weights = None
        if config.pretrained and state is None:
            from common import weights as readers

            build_options, weights = readers.for_training(config.pretrained, self.spec, build_options, explicit)
        if state is None and config.output_dir and config.resume != "auto":
            _refuse_used_folder(config.output_dir)
        memory_format = config.memory_format if state is None or "memory_format" in explicit else state["memory_format"]
        return Job(
            self.spec,
            config,
            splits,
            plan,
            build_options,
            memory_format,
            state,
            weights,
            schedules=self.schedules,
            first_epoch=self.first_epoch(config, explicit, state),
        )

    def report(self, folder, job):
        """The voice of a run in `folder`, which is None on silent ranks."""
        return self.make_report(folder)

    def global_batch(self, config, explicit, state, world_size, machines):
        """Images of one step over all ranks; --batch-size counts those of a machine."""
        return config.batch_size * machines

    def first_epoch(self, config, explicit, state):
        """Epoch to begin with, counted from 0, when no checkpoint of a run is resumed."""
        return 0

    def name_of_run(self, config):
        """Folder below ./output for this program's runs."""
        return config.run_name or f"{self.spec.name}_train"

    def _build_options(self, config, explicit):
        """Build options that were given on the command line."""
        given = {name: getattr(config, name) for name in ("dropout", "transform_input") if name in explicit}
        for name in given:
            if name not in self.spec.build_options:
                raise UserError(f"--{name.replace('_', '-')}: {self.spec.name} has no such option")
        return given


def _load_splits(config):
    return index.load_splits(config.data, excluded=exclude.read(config.exclude))


# Knobs that may differ from machine to machine: where things are, and how fast they are read.
_OWN_TO_A_MACHINE = ("data", "exclude", "workers", "output_dir", "resume", "pretrained")


def _options_of(config):
    values = dataclasses.asdict(config)
    return {cli.flag_of(f): values[f.name] for f in dataclasses.fields(config) if f.name not in _OWN_TO_A_MACHINE}


def _common_facts(job):
    """What all machines of a run must have alike: images, place to continue at, options."""
    at = "the beginning" if job.state is None else f"epoch {job.state['epoch'] + 1} step {job.state['step']}"
    val = job.splits.val and f"{len(job.splits.val)} images, fingerprint {job.splits.val.fingerprint}"
    return {
        "--data, train/": f"{len(job.splits.train)} images, fingerprint {job.splits.train.fingerprint}",
        "--data, val/": val,
        "--resume": at,
        **_options_of(job.config),
    }


def _resumed_state(config, run_name):
    """Content of the checkpoint that --resume names, or None for a fresh start."""
    if not config.resume:
        return None
    from common import weights
    from common.train import checkpoint

    if config.resume != "auto":
        if not os.path.isfile(config.resume):
            raise UserError(f"--resume: {config.resume} is not a file")
        state = weights.load_torch(config.resume)
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
    found = runs.numbered_runs(runs.OUTPUT / run_name)
    return found[-1] if found else None


def _class_count(config, explicit, splits, state):
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


def _agree_with_checkpoint(spec, config, explicit, state, splits):
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
        if state.get("folder_fingerprint") == splits.train.whole_fingerprint:
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


def _step_plan(config, num_images, world_size, machines, state, global_batch):
    """How a step is cut into micro-batches; a resumed run keeps its micro-batches for any number of ranks."""
    if state is not None:
        plan = order.StepPlan(num_images, state["num_micro_batches"], state["micro_batch_size"])
        if plan.global_batch != global_batch:
            raise UserError(
                f"--batch-size: {config.batch_size} on {machines} machine(s) is {global_batch} images per step, "
                f"but the checkpoint (--resume {config.resume}) has {plan.global_batch}"
            )
    else:
        num_micro_batches = world_size * config.accumulate
        if global_batch % num_micro_batches:
            raise UserError(
                f"--batch-size: {config.batch_size}, must be divisible by {num_micro_batches // machines} "
                f"({world_size // machines} devices x --accumulate {config.accumulate})"
            )
        plan = order.StepPlan(num_images, num_micro_batches, global_batch // num_micro_batches)
    if plan.steps_per_epoch < 1:
        raise UserError(
            f"--batch-size: a step takes {plan.global_batch} images, but train/ holds {num_images}; use a smaller one"
        )
    if plan.micro_batch_size < 2:
        raise UserError(
            f"--batch-size: {config.batch_size} leaves one image per micro-batch; batch norm needs at least 2"
        )
    return plan


def _refuse_used_folder(folder):
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--output-dir: {folder} is not a folder")
    if runs.holds_run(folder):
        raise UserError(
            f"--output-dir: {folder} already holds a run; choose another folder, or continue it with --resume auto"
        )


def _create_folder(job):
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
    parent = runs.OUTPUT / (config.run_name or f"{job.spec.name}_train")
    if job.state is not None and config.resume == "auto":
        return _newest_run(parent.name)
    return runs.new_run(parent)


def _headline(job, trainer, device, world):
    """One line that says what runs where."""
    plan = job.plan
    start = f", resumed at epoch {trainer.epoch + 1} step {trainer.step}" if job.state else ""
    ignored = f" ({job.splits.train.ignored} other files ignored)" if job.splits.train.ignored else ""
    val = f", {len(job.splits.val)} for validation" if job.splits.val else ""
    left_out = job.splits.train.excluded + (job.splits.val.excluded if job.splits.val else 0)
    val += f", {left_out} left out by --exclude" if job.config.exclude else ""
    return (
        f"{job.spec.name}: {len(job.splits.train)} images{ignored} in {len(job.splits.classes)} classes{val}; "
        f"{world.size} rank(s) on {device.describe()}, {trainer.memory_format}, amp {trainer.amp_type or 'off'}; "
        f"{plan.steps_per_epoch} steps of {plan.global_batch} images "
        f"in {plan.num_micro_batches} micro-batch(es){start}; {job.folder}"
    )
