"""The training program of a model: command line -> checked Job -> Trainer.

A model's train.py binds its spec and recipe: `PROGRAM = TrainProgram(SPEC, RECIPE, __doc__)`. common/launch.py calls
`PROGRAM.check` once before any process exists; every process then calls `PROGRAM.main`. torch is imported only after
the command line has been read, so that --help and mistakes answer at once.
"""

import dataclasses
import os

from common import cli, run_folder
from common.data import exclude, index
from common.errors import UserError
from common.train import run_log, run_setup, schedules


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

    def __init__(self, spec, recipe, description, schedules=None, make_report=run_log.Report, load_data=None):
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
        config, explicit = self.parse(argv)
        job = None if config.evaluate else self._prepare(config, explicit, world_size, machines)
        from common.device import device as devices

        last = world_size // machines - 1
        device = devices.choose(config.device_kind, config.device_index if world_size == 1 else last)
        device.check(config)
        if job is not None:
            return run_setup.common_facts(job)
        from common.distributed import World
        from common.evaluation import program

        program.prepare(self.spec, self.evaluation(config, explicit), device, World())
        return run_setup.options_of(config)

    def prepare(self, argv=None):
        """The checked Job of a single-process run, without a run folder; for programs that drive the Trainer."""
        return self._prepare(*self.parse(argv), world_size=1, machines=1)

    def main(self, argv=None):
        """Train (or, with --evaluate, evaluate) in this process; ends it with the documented exit status."""
        with cli.rank_exit_on_error():
            config, explicit = self.parse(argv)
            job = None
            if "WORLD_SIZE" not in os.environ and not config.evaluate:
                job = self._prepare(config, explicit, 1, 1)  # before torch is imported, so that mistakes answer at once
            from common import distributed
            from common.device import device as devices

            world = distributed.world_from_environment()
            if config.evaluate:
                self._evaluate(config, explicit, world)
                return
            device = devices.choose(config.device_kind, world.local_rank if world.size > 1 else config.device_index)
            device.activate()
            device.check(config)
            if config.full_fp32:
                device.use_full_fp32()
            group = distributed.Group(world, device, config.rendezvous_timeout)
            job = job or group.local_rank0_first(lambda: self._prepare(config, explicit, world.size, world.num_nodes))
            group.check_same(job.splits.summary, "--data")
            self._train(job, world, device, group)
            group.close()

    def _train(self, job, world, device, group):
        from common.distributed import translate_worker_failures
        from common.train.trainer import Trainer

        folder = group.broadcast_object(run_setup.create_folder(job) if world.is_main else None)
        job = dataclasses.replace(job, folder=folder)
        say = self.report(folder if world.is_main else None, job)
        try:
            say.write(
                run_folder.CONFIG,
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
                with translate_worker_failures():
                    trainer.fit()
            finally:
                trainer.close()
        finally:
            say.close()

    def _evaluate(self, config, explicit, world):
        from common.evaluation import program

        counts, _ = program.evaluate_folder(self.spec, self.evaluation(config, explicit), world=world)
        if world.is_main:
            print(counts)

    def evaluation(self, config, explicit):
        """--evaluate as a configuration of the evaluation that eval.py does."""
        from common.evaluation.program import EvalConfig

        return EvalConfig(
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
            full_fp32=config.full_fp32,
        )

    def _prepare(self, config, explicit, world_size, machines):
        """Everything that is the same on all ranks, checked: a Job without its folder."""
        state = run_setup.resumed_state(config, self.name_of_run(config))
        splits = self.load_data(config)
        num_classes = run_setup.class_count(config, explicit, splits, state)
        build_options = {**self.spec.build_options, **self._build_options(config, explicit), "num_classes": num_classes}
        if state is not None:
            config, build_options = run_setup.agree_with_checkpoint(self.spec, config, explicit, state, splits)
        # Machines may come and go: the plan of a step is made for all that could take part.
        planned = config.machines or machines
        planned_ranks = world_size // machines * planned
        global_batch = self.global_batch(config, explicit, state, planned_ranks, planned)
        plan = run_setup.step_plan(config, len(splits.train), planned_ranks, planned, state, global_batch)
        plan.check_world_size(world_size)
        schedules.make(config, plan.steps_per_epoch, self.schedules)
        weights = None
        if config.pretrained and state is None:
            from common.weights.load import load_pretrained

            build_options, weights = load_pretrained(config.pretrained, self.spec, build_options, explicit)
        if state is None and config.output_dir and config.resume != "auto":
            run_setup.refuse_used_folder(config.output_dir)
        memory_format = config.memory_format if state is None or "memory_format" in explicit else state["memory_format"]
        return run_setup.Job(
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


def _headline(job, trainer, device, world):
    """One line that says what runs where."""
    plan, learner = job.plan, trainer.learner
    start = f", resumed at epoch {trainer.epoch + 1} step {trainer.step}" if job.state is not None else ""
    ignored = f" ({job.splits.train.ignored} other files ignored)" if job.splits.train.ignored else ""
    val = f", {len(job.splits.val)} for validation" if job.splits.val is not None else ""
    left_out = job.splits.train.excluded + (job.splits.val.excluded if job.splits.val is not None else 0)
    val += f", {left_out} left out by --exclude" if job.config.exclude else ""
    return (
        f"{job.spec.name}: {len(job.splits.train)} images{ignored} in {len(job.splits.classes)} classes{val}; "
        f"{world.size} rank(s) on {device.describe()}, {learner.memory_format}, amp {learner.amp_type or 'off'}; "
        f"{plan.steps_per_epoch} steps of {plan.global_batch_size} images "
        f"in {plan.num_micro_batches} micro-batch(es){start}; {job.folder}"
    )
