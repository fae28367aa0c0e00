"""The run loop: every step a function of (config, epoch, step), so that a run survives being stopped anywhere."""

import dataclasses
import functools
import platform
import signal
import sys
import time

import torch

from common import distributed, errors, parallel, run_folder
from common.data import loader, sampling, transforms
from common.data.decode import BadImage
from common.device import device as devices
from common.errors import RunError
from common.evaluation import evaluate
from common.train import checkpoint, losses, meters, signals, watchdog
from common.train.step import TrainStep

# How long a rank that hangs lets the writer of its last checkpoint finish.
_LAST_WRITE_S = 60


class Trainer:
    """One run of a Job (see common/train/jobs.py) in this process.

    Args:
      job: the checked configuration: spec, config, splits, plan, build options, resumed state.
      world, device, group: place of this rank.
      say: report.Report.
    """

    def __init__(self, job, world, device, group, say):
        self.job, self.config, self.plan, self.spec = job, job.config, job.plan, job.spec
        self.world, self.device, self.group, self.say = world, device, group, say
        config = self.config
        self.started = self.saved_at = time.perf_counter()
        self.save_every_steps, self.save_every_s = config.save_interval
        threads = devices.set_threads(config.threads, world.local_size)
        self.learner = TrainStep(job, world, device, group)
        self.window, self.my_micro_batches = self.learner.window, self.learner.my_micro_batches

        # Resume > pretrained > scratch.
        self.epoch, self.step, self.best_acc1, self.best_epoch = job.first_epoch, 0, 0.0, None
        if job.state is not None:
            state = job.state
            self.epoch, self.step = state["epoch"], state["step"]
            self.best_acc1, self.best_epoch = state["best_acc1"], state["best_epoch"]
            if state["threads"] != threads:
                say.line(
                    f"resume: {threads} threads per process, before {state['threads']}; "
                    "results may differ in the last bits"
                )
        self.threads = threads
        self.saved_place = self.epoch, self.step  # nothing is new there

        # Loaders.
        workers = parallel.dataloader_workers(config.workers, world.local_size)
        self.train_loader = loader.TrainLoader(
            job.splits.train,
            transforms.train_transform(config),
            self.plan,
            config.seed,
            config.on_bad_image,
            world.rank,
            world.size,
            workers,
            device.pin_memory,
        )
        self.val_loader = None
        if job.splits.val is not None:
            self.val_loader = loader.EvalLoader(
                job.splits.val,
                transforms.eval_transform(self.spec, config.image_size),
                config.eval_batch_size,
                config.on_bad_image,
                world.rank,
                world.size,
                workers,
                device.pin_memory,
            )
        self.engine = self.learner.engine()
        self.eval_smoothing = losses.effective_smoothing(config, job.build_options["num_classes"])
        self.throughput = meters.Throughput(device, config.throughput_skip_steps, self.plan.global_batch_size)

        # What goes on beside the training, last: until here nothing needs to be closed.
        self.writer = checkpoint.Writer(
            job.folder, config.keep_last, config.keep_best, config.on_save_error == "stop", say.line
        )
        self.interrupt = signals.Interrupt()
        self.last_image = None
        self.watch = watchdog.Watch(world, config.hang_timeout, self._where, self._leave)

    # ---- the run -------------------------------------------------------------------------------------------------

    def fit(self):
        """Train to the end, or to a signal.

        Returns:
          dict, the summary of the run.
        Raises:
          SystemExit: 143 after SIGTERM, when the checkpoint of that very step is on disk.
        """
        counts = None
        while self.epoch < self.config.epochs and not self._reached_max_steps():
            self._train_epoch()
            counts, is_best = self._validate()
            if self.step == self.plan.steps_per_epoch:
                self.epoch, self.step = self.epoch + 1, 0
            self._save(counts, is_best)
        self._wait_for_writer()
        return self._finish(counts)

    def _reached_max_steps(self):
        done = self.epoch * self.plan.steps_per_epoch + self.step
        return self.config.max_steps is not None and done >= self.config.max_steps

    def _train_epoch(self):
        """Run the steps of the current epoch from self.step on, to its end or to --max-steps; saves at the end."""
        config, steps = self.config, self.plan.steps_per_epoch
        if self.step == steps:  # the run was stopped during the validation of this epoch
            return
        self.say.epoch_begins(self.epoch, self.step, steps)
        self.watch.at("loading images")
        batches = self.train_loader.epoch(self.epoch, self.step)
        self.learner.network.train()
        self.window.restart()
        self.throughput.start()
        while self.step < steps and not self._reached_max_steps():
            self.watch.at("loading images")
            mine, error = self._fetch(batches)
            self.watch.at(watchdog.WAITING)
            agreed = self.group.sync_status(self._requested_action(), error or self.writer.fatal)
            if agreed in (distributed.RESTART, distributed.STOP):
                self._stop(agreed)
            if agreed == distributed.SAVE:
                self._save()
            self.watch.at("training")
            self.learner.train_step(self.epoch, self.step, mine)
            self.step += 1
            self.throughput.step()
            self.say.step_done()
            if self.step % config.print_freq == 0 or self.step == steps:
                self._print_progress()
            if self.save_every_steps and self.step % self.save_every_steps == 0:
                self._save()
        self.throughput.stop()
        self._save()

    def _fetch(self, batches):
        """(this rank's micro-batches of a step, the error that kept it from having them)."""
        try:
            mine = [next(batches) for _ in self.my_micro_batches]
            for batch in mine:
                batch.raise_if_failed()
                self.last_image = batch.indices_N[-1:]
                for path, reason in batch.bad:
                    print(f"skipped: {path} ({reason})", file=sys.stderr, flush=True)
                    self.say.numbers(kind="bad_image", path=path, reason=reason)
        except BadImage as error:
            return [], error
        return mine, None

    def _requested_action(self):
        """What this rank wants to happen before the next step."""
        if self.interrupt:
            return distributed.RESTART if self.interrupt.signal == distributed.RESTART_SIGNAL else distributed.STOP
        due = self.save_every_s and time.perf_counter() - self.saved_at >= self.save_every_s
        due = due and (self.epoch, self.step) != self.saved_place
        return distributed.SAVE if due and self.world.is_main else distributed.RUN

    # ---- validation, progress ------------------------------------------------------------------------------------

    def _validate(self):
        """(Counts of the validation set, whether this is the best epoch); without a validation set, (None, False)."""
        if self.val_loader is None:
            self.say.epoch_done(self.epoch, self.config.epochs, None, False)
            return None, False
        counts = evaluate.evaluate(
            self.engine,
            self.val_loader,
            len(self.job.splits.val),
            self.group,
            self.eval_smoothing,
            interrupted=self._interrupts_validation,
        )
        self.watch.at("validating")
        if counts is None:
            self._stop(self.group.all_reduce_max(self._requested_action()))
        is_best = self.best_epoch is None or counts.percent(1) > self.best_acc1
        if is_best:
            self.best_acc1, self.best_epoch = counts.percent(1), self.epoch + 1
        self.say.epoch_done(self.epoch, self.config.epochs, counts, is_best)
        self.say.numbers(
            kind="val",
            epoch=self.epoch + 1,
            step=self.step,
            acc1=counts.percent(1),
            acc5=counts.percent(5),
            loss=counts.loss,
            correct=counts.correct.tolist(),
            seen=counts.seen,
            skipped=counts.skipped,
        )
        return counts, is_best

    def _interrupts_validation(self):
        self.watch.at("validating")
        return bool(self.interrupt)

    def _print_progress(self):
        self.group.sync_status(error=self._non_finite())
        loss, acc1, last_loss = self.window.means(self.group)
        lr, fps = self.learner.optimizer.param_groups[0]["lr"], self.window.images_per_s(self.plan.global_batch_size)
        steps = self.plan.steps_per_epoch
        self.say.progress(self.epoch, self.config.epochs, self.step, steps, loss, acc1, lr, fps, last_loss)
        self.say.numbers(kind="train", epoch=self.epoch + 1, step=self.step, loss=loss, acc1=acc1, lr=lr, fps=fps)
        self.window.restart()

    def _non_finite(self):
        """A RunError that names the step and the images of the first loss that is not finite, or None."""
        found = self.window.first_non_finite()
        if found is None:
            return None
        epoch, step, loss = found
        batches = sampling.epoch_batches(self.plan, self.config.seed, epoch, step, self.world.rank, self.world.size)
        images = [self.job.splits.train.name(i) for _, i in next(batches)]
        return RunError(
            f"the loss is {loss} at epoch {epoch + 1} step {step + 1} (rank {self.world.rank}, images "
            f"{', '.join(images[:4])}{' ...' if len(images) > 4 else ''}); lower --lr or look at these images"
        )

    # ---- state ---------------------------------------------------------------------------------------------------

    def state(self):
        """Everything a later process needs to go on; plain values and host tensors only."""
        job = self.job
        return dict(
            arch=self.spec.name,
            build=job.build_options,
            image_size=self.config.image_size,
            classes=list(job.splits.classes),
            epoch=self.epoch,
            step=self.step,
            best_acc1=self.best_acc1,
            best_epoch=self.best_epoch,
            num_micro_batches=self.plan.num_micro_batches,
            micro_batch_size=self.plan.micro_batch_size,
            data_fingerprint=job.splits.train.fingerprint,
            folder_fingerprint=job.splits.train.full_fingerprint,
            num_images=len(job.splits.train),
            threads=self.threads,
            config=dataclasses.asdict(self.config),
            torch_version=str(torch.__version__),
            **self.learner.state(),
        )

    def _save(self, counts=None, is_best=False):
        """Begin to write the state of this very step, after all ranks know that their losses are finite.

        Rank 0 does it, beside the steps that follow; `counts` are those of a validation that was just done.
        """
        with self.throughput.paused():
            self.group.sync_status(error=self._non_finite())
            self.saved_at, self.saved_place = time.perf_counter(), (self.epoch, self.step)
            if self.world.is_main:
                self.watch.at("writing the checkpoint before this one")
                self.writer.wait()
                self.watch.at("saving")
                steps, done = self.plan.steps_per_epoch, None
                if counts is not None or self.job.splits.val is None:
                    done = functools.partial(self._epoch_saved, self.epoch) if self.step == 0 else None
                acc1 = None if counts is None else counts.percent(1)
                snapshot = checkpoint.Snapshot(self.state(), self.epoch * steps + self.step, is_best, acc1, done)
                self.writer.save(snapshot)
                self.watch.at("saving")

    def _epoch_saved(self, epochs_done):
        self.say.epoch_saved(self.job.folder / checkpoint.NEWEST, epochs_done, self.plan.steps_per_epoch)

    def _wait_for_writer(self):
        """Return when the last checkpoint is on the disk; one that is not ends all ranks with the reason."""
        self.watch.at("writing the last checkpoint")
        error = self.writer.wait()
        self.watch.at(watchdog.WAITING)
        self.group.sync_status(error=error)

    def _stop(self, agreed):
        """End all ranks with the checkpoint of this step."""
        self._save()
        self._wait_for_writer()
        if agreed == distributed.RESTART:
            sys.exit(errors.EXIT_RESTART)
        self.say.line(f"stopped at epoch {self.epoch + 1} step {self.step}; --resume auto continues there")
        sys.exit(130 if self.interrupt.signal == signal.SIGINT else errors.EXIT_TERMINATED)

    def close(self):
        """End what runs beside the training: the writer when it is done, the loaders' processes at once."""
        self.watch.close()
        self.writer.wait()
        self.interrupt.close()
        self.train_loader.close()
        if self.val_loader is not None:
            self.val_loader.close()

    # ---- the heartbeat, called from its thread -------------------------------------------------------------------

    def _where(self):
        """Step and images at hand, for the report of a hang."""
        index, last = self.job.splits.train, self.last_image
        words = [f"epoch {self.epoch + 1} step {self.step + 1}"]
        if last is not None and len(last):
            words.append(f"last image {index.path(int(last))}")
        for loader_of, images in ((self.train_loader, index), (self.val_loader, self.job.splits.val)):
            if loader_of is not None and (reading := loader_of.reading()):
                words.append(f"reading {', '.join(str(images.path(i)) for i in reading)}")
        return ", ".join(words)

    def _leave(self, report_of_hang):
        if report_of_hang:
            print(f"error: {report_of_hang}", file=sys.stderr, flush=True)
        self.writer.wait(timeout=_LAST_WRITE_S)
        signals.leave_now(1)

    def _images_per_s_of_machines(self):
        """Images per second of each machine, by the clocks of its own ranks; every machine prints its own."""
        world, speeds = self.world, [0.0] * self.world.num_nodes
        share = len(self.my_micro_batches) / self.plan.num_micro_batches
        speeds[world.node_rank] = self.throughput.images_per_s * share
        speeds = self.group.all_reduce_sum(speeds)
        if world.num_nodes > 1 and world.local_rank == 0:
            text = f"machine {world.node_rank} of {world.num_nodes}: {speeds[world.node_rank]:.3f} images/sec"
            self.say.line(text) if world.is_main else print(text, flush=True)
        return speeds

    def _finish(self, counts):
        duration_s = time.perf_counter() - self.started
        fps_of_machines = self._images_per_s_of_machines()
        fps = sum(fps_of_machines)
        summary = dict(
            arch=self.spec.name,
            best_acc1=self.best_acc1,
            best_epoch=self.best_epoch,
            images_per_s=fps,
            images_per_s_of_machines=fps_of_machines,
            warm_up_steps_left_out=self.throughput.left_out,
            duration_s=duration_s,
            val_images=None if counts is None else counts.seen,
            device=self.device.describe(),
            ranks=self.world.size,
            amp=self.learner.amp_type,
            memory_format=self.learner.memory_format,
            torch=torch.__version__,
            python=platform.python_version(),
            folder=str(self.job.folder),
        )
        self.say.write(run_folder.SUMMARY, summary)
        self.say.line(
            f"throughput leaves out the first {self.throughput.left_out} steps and all evaluation; "
            f"files are in {self.job.folder}"
        )
        self.say.final(fps, self.best_acc1, duration_s)
        return summary
