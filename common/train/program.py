"""The training program of a model: command line -> checked RunSetup -> Trainer.

A model's train.py binds its spec and recipes: `PROGRAM = TrainProgram(SPEC, RECIPES, __doc__)`. common/launch/launch.py
calls `PROGRAM.check` once before any process exists; every process then calls `PROGRAM.main`. torch is imported only
after the command line has been read, so that --help and errors in options are immediate.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common import cli, files, run_folder
from common.config import AUTO, Recipe, TrainConfig
from common.data import exclude, index
from common.errors import NothingToDo, UserError
from common.spec import ModelSpec
from common.train import event_files, run_setup, schedules
from common.train.run_setup import RunSetup

if TYPE_CHECKING:
    from common.device.device import Device
    from common.distributed import Group, World
    from common.evaluation.program import EvalConfig
    from common.train.run_log import RunLogger
    from common.train.trainer import Trainer

SMALL_SET = 20_000  # training images below which the recipes for fine-tuning are named


class TrainProgram:
    """Command line and checks of one model's training. A model with other conventions overrides the public methods.

    Args:
      spec: ModelSpec.
      recipes: recipes by name; the first one holds the defaults.
      description: docstring of the script, shown by --help.
    """

    # Further learning-rate schedules by name, as in common/train/schedules.py.
    extra_schedules: Mapping[str, schedules.Schedule] = {}

    def __init__(self, spec: ModelSpec, recipes: Mapping[str, Recipe], description: str) -> None:
        self.spec, self.recipes, self.description = spec, recipes, description

    # ---- what a model may override -------------------------------------------------------------------------------

    def default_recipe(self, argv: Sequence[str] | None) -> str:
        """Name of the recipe to use when --recipe is not given."""
        return next(iter(self.recipes))

    def load_splits(self, config: TrainConfig) -> index.Splits:
        """Index the training and validation images."""
        excluded = exclude.read(config.exclude)
        return index.load_splits(config.data, excluded=excluded, numbers=config.label_numbers)

    def make_logger(self, folder: pathlib.Path | None, setup: RunSetup) -> "RunLogger":
        """Logger of a run in `folder`, which is None on ranks other than 0."""
        from common.train.run_log import RunLogger

        return RunLogger(folder)

    def global_batch(
        self,
        config: TrainConfig,
        explicit: frozenset[str],
        state: dict[str, Any] | None,
        world_size: int,
        machines: int,
    ) -> int:
        """Images of one step over all ranks; --batch-size counts those of a machine."""
        return config.batch_size * machines

    def batch_size_of(self, config: TrainConfig, micro_batch: int, devices: int) -> int:
        """--batch-size for micro-batches of this many images on each of a machine's devices."""
        return micro_batch * config.accumulate * devices

    def first_epoch(self, config: TrainConfig, explicit: frozenset[str], state: dict[str, Any] | None) -> int:
        """Epoch to begin with, counted from 0, when no checkpoint of a run is resumed."""
        return 0

    def evaluation_config(self, config: TrainConfig, explicit: frozenset[str]) -> "EvalConfig":
        """--evaluate as options of the evaluation that eval.py does."""
        from common.evaluation.program import EvalConfig
        from common.weights.load import weight_file

        size = config.image_size if "image_size" in explicit else None
        return EvalConfig(
            data=config.data,
            resume=config.resume or weight_file(config.pretrained, self.spec),
            device=config.device_kind,
            device_id=config.device_index,
            batch_size=config.eval_batch_size,
            exclude=config.exclude,
            label_numbers=config.label_numbers,
            workers=config.workers,
            threads=config.threads or 0,
            num_classes=config.num_classes if "num_classes" in explicit else None,
            image_size=config.eval_size if "eval_size" in explicit else size,
            transform_input=config.transform_input,
            full_fp32=config.full_fp32,
            use_ema=config.use_ema,
            on_bad_image=config.on_bad_image,
            predictions=config.predictions,
        )

    # ---- the program ---------------------------------------------------------------------------------------------

    def parse(self, argv: Sequence[str] | None = None) -> tuple[TrainConfig, frozenset[str]]:
        """(config, names of the fields the user gave)."""
        name = self.recipe_name(argv)
        config, explicit = cli.parse(
            self.recipes[name].config, self.description + self._recipe_table(), argv, require=False
        )
        config = dataclasses.replace(config, recipe=name)
        if config.arch and config.arch not in (self.spec.name, self.spec.name.replace("_", "")):
            raise UserError(f"--arch: {config.arch}, this script trains {self.spec.name}")
        self.spec.check_image_size(config.image_size)
        self.spec.check_image_size(config.evaluation_size, "--eval-size")
        return config, explicit

    def recipe_name(self, argv: Sequence[str] | None) -> str:
        """Name of the recipe that a command line selects.

        Raises:
          UserError: an unknown name.
        """
        parser = cli.Parser("", add_help=False)
        parser.add_argument("--recipe", default="")
        given = parser.parse_known_args(argv)[0].recipe
        name = given if given not in ("", "auto") else self.default_recipe(argv)
        if name not in self.recipes:
            raise UserError(f"--recipe: {name}, must be one of {', '.join(self.recipes)}")
        return name

    def _recipe_table(self) -> str:
        """The recipes for --help: name, hardware, expected accuracy and speed."""
        rows = [f"  {name:16} {recipe.hardware:10} {recipe.expected}" for name, recipe in self.recipes.items()]
        return "\nrecipes (--recipe NAME; with --help: the defaults of that recipe):\n" + "\n".join(rows)

    def check(self, argv: Sequence[str], world_size: int = 1, machines: int = 1) -> dict[str, Any]:
        """Check everything that can be checked before a process starts, for `world_size` ranks on `machines`.

        Returns:
          {name: value} that all machines of the run must share; a name is a flag or a few words.
        Raises:
          UserError: the first error found.
        """
        config, explicit = self.parse(argv)
        setup = None if config.evaluate else self.prepare(config, explicit, world_size, machines)
        from common.device import device as devices

        last = world_size // machines - 1
        device = devices.choose(config.device_kind, config.device_index if world_size == 1 else last)
        device.check(config)
        if setup is not None and setup.finished:
            raise NothingToDo(setup.finished)
        if setup is not None:
            return run_setup.shared_facts(setup)
        from common.distributed import World
        from common.evaluation import program

        program.prepare(self.spec, self.evaluation_config(config, explicit), device, World())
        return run_setup.shared_options(config)

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Train (or, with --evaluate, evaluate) in this process; ends it with the documented exit status."""
        with cli.rank_exit_on_error():
            config, explicit = self.parse(argv)
            setup = None
            if "WORLD_SIZE" not in os.environ and not config.evaluate:
                setup = self.prepare(config, explicit)  # before torch is imported: errors are immediate
                if setup.finished:
                    raise NothingToDo(setup.finished)
            from common import distributed
            from common.data import augment
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
            with group.reports_once():

                def prepare(config: TrainConfig) -> RunSetup:
                    ranks = (world.size, world.num_nodes)
                    return group.local_rank0_first(lambda: self.prepare(config, explicit, *ranks))

                setup = setup or prepare(config)
                group.check_same(setup.splits.summary, "--data")
                remedy = "install the same Pillow, torchvision and simplejpeg on all nodes, or give --decoder pil"
                group.check_same(augment.decoder_fingerprint(config.decoder), "--decoder", remedy)
                if setup.finds_batch_size:
                    from common.train import tuner

                    images, note = tuner.micro_batch_size(setup, group)
                    size = self.batch_size_of(config, images, world.local_size)
                    setup = prepare(dataclasses.replace(config, batch_size=size))
                    setup = dataclasses.replace(setup, found={"batch_size": size}, notes=(note, *setup.notes))
                if not setup.finished:
                    self._train(setup, group)
                elif world.is_main:  # the launcher has looked already, but ranks that start again may find it
                    print(setup.finished, flush=True)
                group.close()

    def _train(self, setup: RunSetup, group: "Group") -> None:
        from common.train.probe import ProbeTrainer, trained_classifier
        from common.train.trainer import Trainer

        with contextlib.ExitStack() as stack:
            folder = group.from_rank0(lambda: stack.enter_context(run_setup.claimed_folder(setup)))
            setup = dataclasses.replace(setup, folder=folder)
            logger = self.make_logger(folder if group.world.is_main else None, setup)
            stack.callback(logger.close)
            if setup.config.tensorboard:
                logger.events = event_files.EventFiles(folder, setup)
            if setup.config.head_init == "probe" and setup.state is None:
                assert setup.weights is not None
                setup = dataclasses.replace(
                    setup, weights={**setup.weights, **trained_classifier(setup, group, logger)}
                )
            if setup.config.lr_find and setup.state is None:
                from common.train import tuner

                lr = tuner.learning_rate(setup, group, logger)
                config = dataclasses.replace(setup.config, lr=lr)
                lr_at = schedules.make(config, setup.plan.steps_per_epoch, self.extra_schedules)
                setup = dataclasses.replace(setup, config=config, lr_at=lr_at, found={**setup.found, "lr": lr})
            logger.write_json(
                run_folder.CONFIG,
                dict(
                    dataclasses.asdict(setup.config),
                    found=setup.found,
                    arch=self.spec.name,
                    ranks=group.world.size,
                    num_micro_batches=setup.plan.num_micro_batches,
                    build=setup.build_options,
                ),
            )
            trainer = (ProbeTrainer if setup.config.cache_features else Trainer)(setup, group, logger)
            stack.callback(trainer.close)
            logger.info(_headline(trainer, group.device))
            for note in run_setup.notes(setup):
                logger.info(note)
            trainer.fit()

    def _evaluate(self, config: TrainConfig, explicit: frozenset[str], world: "World") -> None:
        from common.evaluation import program

        counts, _ = program.evaluate_folder(self.spec, self.evaluation_config(config, explicit), world=world)
        if world.is_main:
            print(counts)

    def prepare(
        self, config: TrainConfig, explicit: frozenset[str], world_size: int = 1, machines: int = 1
    ) -> RunSetup:
        """Check everything that is the same on all ranks.

        Returns:
          a RunSetup without its folder.
        """
        cli.check_required(config)
        if config.tensorboard:
            event_files.check_installed()
        state = run_setup.load_resume_state(config, self.run_name(config))
        splits = self.load_splits(config)
        num_classes = run_setup.class_count(config, explicit, splits, state)
        given = self._build_options(config)
        build_options: Mapping[str, Any] = {**self.spec.build_options, **given, "num_classes": num_classes}
        if state is not None and config.use_ema is not None:
            raise UserError("--use-ema: chooses among the weights of --pretrained; a resumed run continues with both")
        if state is not None:
            config, build_options = run_setup.reconcile_with_checkpoint(self.spec, config, explicit, state, splits)
        config, found_values = run_setup.keep_found(config, explicit, state)
        # With an elastic number of machines the step is planned for the largest one.
        planned, devices = config.machines or machines, world_size // machines
        planned_ranks = devices * planned
        finds_batch_size = config.batch_size == AUTO
        if finds_batch_size:
            config = dataclasses.replace(
                config, batch_size=self.batch_size_of(config, run_setup.SMALLEST_MICRO_BATCH, devices)
            )
        global_batch = self.global_batch(config, explicit, state, planned_ranks, planned)
        if config.cache_features and "batch_size" in explicit:
            raise UserError("--batch-size: has no effect with --cache-features, a step takes all images; leave it out")
        plan = run_setup.step_plan(config, len(splits.train), planned_ranks, planned, state, global_batch)
        finished = run_setup.finished(config, state, plan, self.run_name(config), machines) if state else ""
        if not finished:
            plan.check_world_size(world_size)
        lr_at = schedules.make(config, plan.steps_per_epoch, self.extra_schedules)
        weights: Mapping[str, Any] | None = None
        notes: list[str] = []
        if state is not None:
            notes = run_setup.changed_options(config, state) + run_setup.ignored_options(config, explicit, state)
            if not finished:
                notes += run_setup.order_notes(config, state, plan) + run_setup.forget_best(state, splits.val)
        elif config.pretrained:
            from common.train import freeze
            from common.weights.load import load_pretrained, weight_file

            if config.freeze != "none":
                build_options, note = freeze.adapt_build_options(self.spec, build_options, config.freeze)
                notes.append(note)
            build_options, weights, found = load_pretrained(
                weight_file(config.pretrained, self.spec),
                self.spec,
                build_options,
                explicit | given.keys(),
                config.use_ema,
                config.seed,
            )
            notes += found + self._recipe_notes(config, explicit, len(splits.train))
        elif config.freeze != "none":
            raise UserError(
                f"--freeze: {config.freeze} needs weights to keep (a recipe may set it); give --pretrained FILE"
            )
        elif config.head_init == "probe":
            raise UserError("--head-init: probe, needs trained weights; give --pretrained FILE")
        if state is None:
            recipe = self.recipes[config.recipe]
            if not finds_batch_size:
                notes += run_setup.note_on_lr(recipe, config, explicit, plan.global_batch_size)
        if state is None and config.output_dir and config.resume != "auto":
            run_setup.refuse_used_folder(config.output_dir)
        files.check_writable(config.output_dir or run_folder.OUTPUT, "--output-dir")
        return RunSetup(
            self.spec,
            config,
            splits,
            plan,
            build_options,
            config.memory_format if state is None or "memory_format" in explicit else state["memory_format"],
            lr_at,
            state,
            weights,
            first_epoch=self.first_epoch(config, explicit, state),
            finds_batch_size=finds_batch_size,
            found=found_values,
            finished=finished,
            notes=tuple(notes),
        )

    def _recipe_notes(self, config: TrainConfig, explicit: frozenset[str], num_images: int) -> list[str]:
        """One line where a recipe for training from scratch starts from weights and has few images."""
        recipes = [name for name, recipe in self.recipes.items() if recipe.config.freeze != "none"]
        if not recipes or config.recipe in recipes or "freeze" in explicit or num_images >= SMALL_SET:
            return []
        return [
            f"note: the recipe {config.recipe} is for training from scratch; for weights of --pretrained and "
            f"{num_images} images there are {' and '.join(f'--recipe {name}' for name in recipes)}"
        ]

    def run_name(self, config: TrainConfig) -> str:
        """Folder below ./output for this program's runs."""
        return config.run_name or f"{self.spec.name}_train"

    def _build_options(self, config: TrainConfig) -> dict[str, Any]:
        """Build options that the recipe or the command line sets."""
        options = ("dropout", "transform_input", "pool_padding")
        given = {name: value for name in options if (value := getattr(config, name)) is not None}
        for name in given:
            if name not in self.spec.build_options:
                raise UserError(f"--{name.replace('_', '-')}: {self.spec.name} has no such option")
        return given


def _headline(trainer: "Trainer", device: "Device") -> str:
    """One line on the run: data, ranks, device, precision, steps, folder."""
    setup, step, state = trainer.setup, trainer.train_step, trainer.state
    plan, splits = setup.plan, setup.splits
    start = f", resumed at epoch {state.epoch + 1} step {state.step}" if setup.state else ""
    val = "" if splits.val is None else f", {len(splits.val)} for validation{splits.val.ignored_note}"
    left_out = splits.train.excluded + (0 if splits.val is None else splits.val.excluded)
    val += f", {left_out} left out by --exclude" if setup.config.exclude else ""
    train = f"{len(splits.train)} images{splits.train.ignored_note} in {len(splits.classes)} classes"
    return (
        f"{setup.spec.name}: {train}{val}; "
        f"{trainer.group.world.size} rank(s) on {device.describe()}, {step.memory_format}, "
        f"amp {step.amp_type or 'off'}; "
        f"{plan.steps_per_epoch} steps of {plan.global_batch_size} images "
        f"in {plan.num_micro_batches} micro-batch(es){start}; {setup.folder}"
    )
