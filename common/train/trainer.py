"""The training loop. A step is a function of (config, epoch, step), so a run can be stopped and resumed anywhere."""

import contextlib
import dataclasses
import functools
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from common import distributed, parallel, run_folder
from common.data import augment, loader, sampling
from common.data.batch import Batch
from common.distributed import Group
from common.errors import EXIT_RESTART, EXIT_TERMINATED, Interrupted, RunError, UserError, print_error
from common.evaluation.metrics import Counts
from common.train import checkpoint, meters, signals, watchdog
from common.train.run_log import RunLogger
from common.train.run_setup import RunSetup
from common.train.step import TrainStep
from common.train.validation import Validator

# How long the watchdog waits for the checkpoint that is being written before it ends a hanging rank.
_LAST_WRITE_S = 60


@dataclasses.dataclass
class TrainState:
    """Position and best result of a run; part of every checkpoint.

    Attributes:
      epoch: counted from 0.
      step: optimizer steps done in this epoch.
      best_acc1: highest validation top-1, percent.
      best_epoch: its epoch, counted from 1.
    """

    epoch: int = 0
    step: int = 0
    best_acc1: float = 0.0
    best_epoch: int | None = None

    @classmethod
    def of(cls, setup: RunSetup) -> "TrainState":
        """The state to start with: the checkpoint's, else the beginning of setup.first_epoch."""
        if setup.state is None:
            return cls(epoch=setup.first_epoch)
        return cls(**{field.name: setup.state[field.name] for field in dataclasses.fields(cls)})


class SaveSchedule:
    """When --save-every asks for a checkpoint within an epoch."""

    def __init__(self, steps: int, seconds: float, state: TrainState) -> None:
        self._steps, self._seconds = steps, seconds
        self.saved(state)

    def saved(self, state: TrainState) -> None:
        """A checkpoint of `state` was begun."""
        self._saved_at, self._saved_place = time.perf_counter(), (state.epoch, state.step)

    def is_due_by_time(self, state: TrainState) -> bool:
        due = bool(self._seconds) and time.perf_counter() - self._saved_at >= self._seconds
        return due and (state.epoch, state.step) != self._saved_place

    def is_due_by_steps(self, state: TrainState) -> bool:
        return bool(self._steps) and state.step % self._steps == 0


class Trainer:
    """One run of a RunSetup on this rank: owns the loop, and what runs beside it (loaders, writer, watchdog)."""

    def __init__(self, setup: RunSetup, group: Group, logger: RunLogger) -> None:
        assert setup.folder is not None
        config, world, device = setup.config, group.world, group.device
        self.setup, self.group, self.logger = setup, group, logger
        self.started = time.perf_counter()
        self.train_step = TrainStep(setup, group)
        self.state = TrainState.of(setup)
        if setup.state is not None and setup.state["threads"] != self.train_step.threads:
            logger.info(
                f"resume: {self.train_step.threads} threads per process, before {setup.state['threads']}; "
                "results may differ in the last bits"
            )
        self.decoder = augment.decoder_fingerprint(config.decoder)
        if setup.state is not None and (before := setup.state.get("decoder", augment.PIL)) != self.decoder:
            logger.info(f"resume: training images are decoded by {self.decoder}, before by {before}; pixels may differ")
        self.save_schedule = SaveSchedule(*config.save_interval, self.state)
        self.workers = parallel.dataloader_workers(config.workers, world.local_size)
        self.train_loader = loader.TrainLoader(
            setup.splits.train,
            augment.TrainTransform(config, setup.spec),
            setup.plan,
            config.seed,
            config.on_bad_image,
            world.rank,
            world.size,
            self.workers,
            device.pin_memory,
        )
        self.validate = Validator(setup, group, self.train_step.engine(), self.workers)
        self.loss_meter = meters.LossMeter()
        self.throughput = meters.Throughput(device, config.throughput_skip_steps, setup.plan.global_batch_size)
        # Threads and signal handlers last: nothing before them needs to be closed.
        self.writer = checkpoint.Writer(
            setup.folder, config.keep_last, config.keep_best, config.on_save_error == "stop", logger.info
        )
        self.interrupt = signals.Interrupt()
        self.train_loader.waiting = self.interrupt.ends_wait
        if self.validate.loader is not None:
            self.validate.loader.waiting = self._waits_in_validation
        self.last_image: torch.Tensor | None = None
        self.watchdog = watchdog.Watchdog(world, config.hang_timeout, self._position, self._abort)

    # ---- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end, or to a signal.

        Returns:
          the summary of the run.
        Raises:
          SystemExit: 143 after SIGTERM, when the checkpoint of that very step is on disk.
        """
        counts = None
        while self.state.epoch < self.setup.config.epochs and not self._reached_max_steps():
            self._train_epoch()
            counts, is_best = self._validate()
            if self.state.step == self.setup.plan.steps_per_epoch:
                self.state.epoch, self.state.step = self.state.epoch + 1, 0
            self._save(counts, is_best)
        self._wait_for_writer()
        return self._finish(counts)

    def _reached_max_steps(self) -> bool:
        max_steps = self.setup.config.max_steps
        return max_steps is not None and self._done_steps() >= max_steps

    def _done_steps(self) -> int:
        """Optimizer steps since the start of the run."""
        return self.state.epoch * self.setup.plan.steps_per_epoch + self.state.step

    def _train_epoch(self) -> None:
        """Run the rest of the current epoch, to its end or to --max-steps; saves at the end."""
        state, num_steps = self.state, self.setup.plan.steps_per_epoch
        if state.step == num_steps:  # the run was stopped during the validation of this epoch
            return
        self.logger.epoch_started(state.epoch, state.step, num_steps)
        self.watchdog.phase("loading images")
        batches = self._batches()
        self.train_step.train()
        self.loss_meter.reset()
        self.throughput.start()
        while state.step < num_steps and not self._reached_max_steps():
            self.watchdog.phase("loading images")
            micro_batches, error = self.fetch(batches)
            self.watchdog.phase(watchdog.WAITING)
            action = self.group.sync_status(self.requested_action(), error or self.writer.fatal)
            if action in (distributed.RESTART, distributed.STOP):
                self._stop(action)
            if action == distributed.SAVE:
                self._save()
            self.watchdog.phase("training")
            result = self.train_step(state.epoch, state.step, micro_batches)
            self.loss_meter.add(state.epoch, state.step, result)
            state.step += 1
            self.throughput.step()
            self.logger.step_done()
            if state.step % self.setup.config.print_freq == 0 or state.step == num_steps:
                self._log_progress()
            if self.save_schedule.is_due_by_steps(state):
                self._save()
        self.throughput.stop()
        self._save()

    def _batches(self) -> Iterator[Batch]:
        """The rest of the current epoch."""
        return self.train_loader.epoch(self.state.epoch, self.state.step)

    def fetch(self, batches: Iterator[Batch]) -> tuple[list[Batch], UserError | RunError | None]:
        """(this rank's micro-batches of a step, the error that prevented them); a signal ends the wait for them."""
        try:
            micro_batches = [next(batches) for _ in self.train_step.micro_batches]
            for batch in micro_batches:
                batch.raise_if_failed()
                self.last_image = batch.indices_N[-1:]
                for path, reason in batch.bad:
                    print_error(f"skipped: {path} ({reason})")
                    self.logger.metrics(kind="bad_image", path=path, reason=reason)
        except Interrupted:
            return [], None
        except (UserError, RunError) as error:
            return [], error
        return micro_batches, None

    def requested_action(self) -> int:
        """The action that this rank asks for before the next step."""
        if self.interrupt:
            return distributed.RESTART if self.interrupt.signal == distributed.RESTART_SIGNAL else distributed.STOP
        if self.logger.output_is_closed:
            return distributed.STOP
        due = self.group.world.is_main and self.save_schedule.is_due_by_time(self.state)
        return distributed.SAVE if due else distributed.RUN

    # ---- validation, progress ------------------------------------------------------------------------------------

    def _validate(self) -> tuple[Counts | None, bool]:
        """(Counts of the validation set, whether this is the best epoch); without a validation set, (None, False)."""
        state, epochs = self.state, self.setup.config.epochs
        if self.validate.loader is None:
            self.logger.validated(state.epoch, epochs, None, False)
            return None, False
        counts = self.validate()
        self.watchdog.phase("validating")
        if counts is None:
            self._stop(self.group.all_reduce_max(self.requested_action()))
        assert counts is not None
        is_best = state.best_epoch is None or counts.percent(1) > state.best_acc1
        if is_best:
            state.best_acc1, state.best_epoch = counts.percent(1), state.epoch + 1
        self.logger.validated(state.epoch, epochs, counts, is_best)
        for note in self.validate.notes(counts, self.loss_meter.last_mean, self._done_steps()):
            self.logger.info(note)
        self.logger.metrics(
            kind="val",
            epoch=state.epoch + 1,
            step=state.step,
            acc1=counts.percent(1),
            acc5=counts.percent(5),
            loss=counts.loss,
            correct=counts.correct.tolist(),
            seen=counts.seen,
            skipped=counts.skipped,
        )
        return counts, is_best

    def _waits_in_validation(self) -> contextlib.AbstractContextManager[None]:
        self.watchdog.phase("validating")
        return self.interrupt.ends_wait()

    def _log_progress(self) -> None:
        self.check_finite()
        state, plan = self.state, self.setup.plan
        means, fps = self.loss_meter.means(self.group), self.loss_meter.images_per_s(plan.global_batch_size)
        epochs = self.setup.config.epochs
        left = meters.time_left(
            self._done_steps(),
            epochs,
            plan.steps_per_epoch,
            self.setup.config.max_steps,
            plan.global_batch_size / fps,
            self.validate.seconds,
        )
        self.logger.progress(state.epoch, epochs, state.step, plan.steps_per_epoch, means, fps, left)
        self.logger.metrics(
            kind="train", epoch=state.epoch + 1, step=state.step, loss=means.loss, acc1=means.acc1, lr=means.lr, fps=fps
        )
        self.loss_meter.reset()

    def check_finite(self) -> None:
        """End all ranks with a RunError that names step and images of the first loss that is not finite."""
        found, error = self.loss_meter.first_non_finite(), None
        if found is not None:
            (epoch, step, loss), world, setup = found, self.group.world, self.setup
            batches = sampling.epoch_batches(setup.plan, setup.config.seed, epoch, step, world.rank, world.size)
            images = [setup.splits.train.name(i) for _, i, _ in next(batches)]
            error = RunError(
                f"the loss is {loss} at epoch {epoch + 1} step {step + 1} (rank {world.rank}, images "
                f"{', '.join(images[:4])}{' ...' if len(images) > 4 else ''}); lower --lr or look at these images",
                is_final=True,
            )
        self.group.sync_status(error=error)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def checkpoint_state(self) -> dict[str, Any]:
        """Everything a later process needs to continue; plain values and host tensors only."""
        setup = self.setup
        return dict(
            arch=setup.spec.name,
            build=setup.build_options,
            image_size=setup.config.evaluation_size,
            classes=list(setup.splits.classes),
            **dataclasses.asdict(self.state),
            order_version=sampling.ORDER_VERSION,
            num_micro_batches=setup.plan.num_micro_batches,
            micro_batch_size=setup.plan.micro_batch_size,
            data_fingerprint=setup.splits.train.fingerprint,
            folder_fingerprint=setup.splits.train.full_fingerprint,
            val_fingerprint=None if setup.splits.val is None else setup.splits.val.fingerprint,
            num_images=len(setup.splits.train),
            config=dataclasses.asdict(setup.config),
            found=dict(setup.found),
            decoder=self.decoder,
            torch_version=str(torch.__version__),
            **self.train_step.state(),
        )

    def _save(self, counts: Counts | None = None, is_best: bool = False) -> None:
        """Begin to write a checkpoint of this step, once all ranks have finite losses.

        Rank 0 writes it in a thread; `counts` are those of the validation that was just done.
        """
        with self.throughput.paused():
            self.check_finite()
            state = self.state
            self.save_schedule.saved(state)
            if self.group.world.is_main:
                self.watchdog.phase("writing the checkpoint before this one")
                self.writer.wait()
                self.watchdog.phase("saving")
                is_epoch_end = state.step == 0 and (counts is not None or self.validate.loader is None)
                then = functools.partial(self._epoch_saved, state.epoch) if is_epoch_end else None
                acc1 = None if counts is None else counts.percent(1)
                self.writer.save(checkpoint.Snapshot(self.checkpoint_state(), self._done_steps(), is_best, acc1, then))
                self.watchdog.phase("saving")

    def _epoch_saved(self, epochs_done: int) -> None:
        newest = self.writer.folder / run_folder.NEWEST
        self.logger.epoch_saved(newest, epochs_done, self.setup.plan.steps_per_epoch)

    def _wait_for_writer(self) -> None:
        """Return when the last checkpoint is on disk; if it could not be written, end all ranks with the reason."""
        self.watchdog.phase("writing the last checkpoint")
        error = self.writer.wait()
        self.watchdog.phase(watchdog.WAITING)
        self.group.sync_status(error=error)

    def _stop(self, action: int) -> None:
        """End all ranks with the checkpoint of this step."""
        self._save()
        self._wait_for_writer()
        if action == distributed.RESTART:
            sys.exit(EXIT_RESTART)
        self.logger.info(
            f"stopped at epoch {self.state.epoch + 1} step {self.state.step}; --resume auto continues there"
        )
        sys.exit(130 if self.interrupt.signal == signal.SIGINT else EXIT_TERMINATED)

    def stop_unsaved(self, action: int) -> None:
        """End the run for RESTART and STOP, without a checkpoint: this trainer's steps are thrown away."""
        if action == distributed.RESTART:
            sys.exit(EXIT_RESTART)
        if action == distributed.STOP:
            self.logger.info("stopped before the first step; nothing is saved")
            sys.exit(130 if self.interrupt.signal == signal.SIGINT else EXIT_TERMINATED)

    def close(self) -> None:
        """Wait for the writer, end the loaders' processes, restore the signal handlers."""
        self.watchdog.close()
        self.writer.wait()
        self.interrupt.close()
        self.train_loader.close()
        self.validate.close()

    # ---- the watchdog, called from its thread --------------------------------------------------------------------

    def _position(self) -> str:
        """Current step and images, for the report of a hang."""
        splits, last = self.setup.splits, self.last_image
        words = [f"epoch {self.state.epoch + 1} step {self.state.step + 1}"]
        if last is not None and len(last):
            words.append(f"last image {splits.train.path(int(last))}")
        for images_loader, images in ((self.train_loader, splits.train), (self.validate.loader, splits.val)):
            if images_loader is not None and images is not None and (reading := images_loader.reading()):
                words.append(f"reading {', '.join(str(images.path(i)) for i in reading)}")
        return ", ".join(words)

    def _abort(self, report: str | None) -> None:
        """End this rank, which hangs or waits for one that does; `report` goes to stderr."""
        if report:
            print_error(f"error: {report}")
        self.writer.wait(timeout=_LAST_WRITE_S)
        signals.exit_immediately(1)

    # ---- the end -------------------------------------------------------------------------------------------------

    def _images_per_s_by_machine(self) -> list[float]:
        """Images per second of each machine, by the clocks of its own ranks; every machine prints its own."""
        world, speeds = self.group.world, [0.0] * self.group.world.num_nodes
        share = len(self.train_step.micro_batches) / self.setup.plan.num_micro_batches
        speeds[world.node_rank] = self.throughput.images_per_s * share
        speeds = self.group.all_reduce_sum(speeds)
        if world.num_nodes > 1 and world.local_rank == 0:
            text = f"machine {world.node_rank} of {world.num_nodes}: {speeds[world.node_rank]:.3f} images/sec"
            self.logger.info(text) if world.is_main else print(text, flush=True)
        return speeds

    def _finish(self, counts: Counts | None) -> dict[str, Any]:
        duration_s = time.perf_counter() - self.started
        fps_by_machine = self._images_per_s_by_machine()
        fps, skipped = sum(fps_by_machine), self.throughput.skipped_steps
        summary = dict(
            arch=self.setup.spec.name,
            best_acc1=self.state.best_acc1,
            best_epoch=self.state.best_epoch,
            steps=self._done_steps(),
            images_per_s=fps,
            images_per_s_of_machines=fps_by_machine,
            warm_up_steps_left_out=skipped,
            duration_s=duration_s,
            val_images=None if counts is None else counts.seen,
            device=self.group.device.describe(),
            ranks=self.group.world.size,
            amp=self.train_step.amp_type,
            memory_format=self.train_step.memory_format,
            torch=torch.__version__,
            python=platform.python_version(),
            folder=str(self.setup.folder),
        )
        self.logger.write_json(run_folder.SUMMARY, summary)
        measured = f"throughput leaves out the first {skipped} steps and all evaluation"
        if fps == 0:
            measured = "no step was left to run, so that no throughput was measured"
        self.logger.info(f"{measured}; files are in {self.setup.folder}")
        self.logger.info(f"report: python tools/report.py {shlex.quote(str(self.setup.folder))} --evaluate")
        if self.state.best_epoch:
            self.logger.info(f"Best validation top-1 : {self.state.best_acc1:.3f} % in epoch {self.state.best_epoch}")
        self.logger.final_result(fps, self.state.best_acc1, duration_s)
        return summary
