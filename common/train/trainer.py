"""The trainer: every step a function of (config, epoch, step), so that a run survives being stopped anywhere.

Legend: m is the index of a micro-batch among all of its step.
"""

import contextlib
import dataclasses
import functools
import platform
import signal
import sys
import time

import torch

from common import cli, device_amp, distributed, evaluate
from common import device as devices
from common.data import loader, order, transforms
from common.data.decode import BadImage
from common.errors import RunError
from common.train import checkpoint, ema, losses, meters, optim, reduction, report, schedules, signals, watch

# How long a rank that hangs lets the writer of its last checkpoint finish.
_LAST_WRITE_S = 60


def _compiled(model):
    """torch.compile with eager's random numbers, so that a step draws the same dropout either way."""
    return torch.compile(model, dynamic=False, options={"fallback_random": True})


class Trainer:
    """One run of a Job (see common/train/program.py) in this process.

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
        self.memory_format = device.memory_format(job.memory_format)
        self.amp_type = device.amp_type(config.amp, config.amp_dtype)

        # Build the network: initial weights are a function of the seed, so all ranks start equal.
        torch.manual_seed(config.seed)
        self.model = self.spec.build(**job.build_options)
        if job.weights is not None:
            self.model.load_state_dict(job.weights)
        self.model.to(device.torch, memory_format=devices.torch_memory_format(self.memory_format))
        self.ema = ema.make_ema(self.model, config.ema)
        self.model, self.optimizer, self.precision = device_amp.prepare(
            self.model, optim.make_optimizer(self.model, config, device), device, self.amp_type, config
        )
        self.lr_at = schedules.make(config, self.plan.steps_per_epoch, job.schedules)
        self.mix = losses.mixer(config, job.build_options["num_classes"])
        self.reduction = reduction.REDUCTIONS[config.reduce](self.model, group, self.plan.num_micro_batches)
        self.my_micro_batches = self.plan.micro_batches_of(world.rank, world.size)

        # Resume > pretrained > scratch.
        self.epoch, self.step, self.best_acc1, self.best_epoch = job.first_epoch, 0, 0.0, None
        if job.state is not None:
            self._load_state(job.state)
            if job.state["threads"] != threads:
                say.line(
                    f"resume: {threads} threads per process, before {job.state['threads']}; "
                    "results may differ in the last bits"
                )
        self.threads = threads
        self.saved_place = self.epoch, self.step  # nothing is new there
        self.network = self._wrapped(_compiled(self.model) if config.compile else self.model)

        # Loaders.
        workers = loader.workers_per_process(config.workers, world.local_size)
        self.train_loader = loader.TrainLoader(
            job.splits.train,
            transforms.train_transform(config),
            self.plan,
            config,
            world.rank,
            world.size,
            workers,
            device.pins_memory,
        )
        self.val_loader = job.splits.val and loader.EvalLoader(
            job.splits.val,
            transforms.eval_transform(self.spec, config.image_size),
            config.eval_batch_size,
            config.on_bad_image,
            world.rank,
            world.size,
            workers,
            device.pins_memory,
        )
        self.normalise = evaluate.Normaliser(self.spec, device, self.memory_format)
        self.engine = evaluate.TorchEngine(
            self.ema.module if self.ema else self.model, self.normalise, device, self.precision.evaluation_type
        )
        self.eval_smoothing = losses.effective_smoothing(config, job.build_options["num_classes"])
        self.throughput = meters.Throughput(device, config.warm_up_steps, self.plan.global_batch)
        self.window = meters.Window()

        # What goes on beside the training, last: until here nothing needs to be closed.
        self.writer = checkpoint.Writer(
            job.folder, config.keep_last, config.keep_best, config.on_save_error == "stop", say.line
        )
        self.interrupt = signals.Interrupt()
        self.last_image = None
        self.watch = watch.Watch(world, config.hang_timeout, self._where, self._leave)

    def _wrapped(self, network):
        """DistributedDataParallel where gradients are summed by all-reduce; its buffers are ours to average."""
        if self.world.size == 1 or self.config.reduce == "exact":
            return network
        ids = None if self.device.kind == "cpu" else [self.device.index]
        return torch.nn.parallel.DistributedDataParallel(
            network,
            device_ids=ids,
            broadcast_buffers=False,
            gradient_as_bucket_view=not optim.keeps_gradients(self.optimizer),
        )

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
        batches = self.train_loader.epoch(self.epoch, self.step)
        self.network.train()
        self.window.restart()
        self.throughput.start()
        while self.step < steps and not self._reached_max_steps():
            self.watch.at("loading images")
            mine, error = self._fetch(batches)
            self.watch.at(watch.WAITING)
            agreed = self.group.go_on(self._wish(), error or self.writer.fatal)
            if agreed in (distributed.RESTART, distributed.STOP):
                self._stop(agreed)
            if agreed == distributed.SAVE:
                self._save()
            self.watch.at("training")
            self._train_step(mine)
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

    def _wish(self):
        """What this rank wants to happen before the next step."""
        if self.interrupt:
            return distributed.RESTART if self.interrupt.signal == distributed.RESTART_SIGNAL else distributed.STOP
        due = self.save_every_s and time.perf_counter() - self.saved_at >= self.save_every_s
        due = due and (self.epoch, self.step) != self.saved_place
        return distributed.SAVE if due and self.world.is_main else distributed.RUN

    def _train_step(self, batches):
        """One optimiser step over this rank's micro-batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.epoch, self.step)
        divisor = self.reduction.loss_divisor(len(self.my_micro_batches), self.plan.num_micro_batches)
        self.optimizer.zero_grad()  # to None or to zero, as the optimizer has it
        self.reduction.begin_step()
        for m, batch in zip(self.my_micro_batches, batches, strict=True):
            # Dropout and mixing are functions of (seed, epoch, step, m): any rank, any restart draws the same.
            torch.manual_seed(order.step_seed(self.config.seed, self.epoch, self.step, m))
            is_last = m == self.my_micro_batches[-1]
            with self._gradients_travel(is_last):
                with self.precision.forward():
                    loss = self._micro_batch_loss(batch)
                self.precision.backward(loss / divisor, self.optimizer, is_last)
            self.reduction.micro_batch_done(is_last)
        self.reduction.end_step(len(self.my_micro_batches))
        if self.config.clip_grad:
            parameters = self.precision.true_gradients(self.model, self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)
        self.precision.step(self.optimizer)
        if self.ema:
            self.ema.update_parameters(self.model)

    def _gradients_travel(self, is_last):
        """DDP sends gradients with the last micro-batch of a rank only."""
        if is_last or not isinstance(self.network, torch.nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def _micro_batch_loss(self, batch):
        images = self.normalise(batch.pixels_NHWC)
        targets = labels = batch.labels_N.to(self.device.torch, non_blocking=True)
        if self.mix:
            images, targets = self.mix(images, labels)
        outputs = self.network(images)
        loss = losses.training_loss(outputs, targets, self.config, self.spec.aux_weight)
        self.window.add(self.epoch, self.step, loss, outputs, labels)
        return loss

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
            self._stop(self.group.agree(self._wish()))
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
        self.group.go_on(error=self._non_finite())
        loss, acc1, last_loss = self.window.means(self.group)
        lr, fps = self.optimizer.param_groups[0]["lr"], self.window.images_per_s(self.plan.global_batch)
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
        batches = order.epoch_batches(self.plan, self.config.seed, epoch, step, self.world.rank, self.world.size)
        images = [self.job.splits.train.name(i) for _, i in next(batches)]
        return RunError(
            f"the loss is {loss} at epoch {epoch + 1} step {step + 1} (rank {self.world.rank}, images "
            f"{', '.join(images[:4])}{' ...' if len(images) > 4 else ''}); lower --lr or look at these images"
        )

    # ---- state ---------------------------------------------------------------------------------------------------

    def state(self):
        """Everything a later process needs to go on; plain values and host tensors only."""
        job = self.job
        return checkpoint.on_host(
            dict(
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
                folder_fingerprint=job.splits.train.whole_fingerprint,
                num_images=len(job.splits.train),
                memory_format=self.memory_format,
                amp_type=self.amp_type,
                threads=self.threads,
                config=dataclasses.asdict(self.config),
                torch_version=str(torch.__version__),
                state_dict=self.model.state_dict(),
                ema_state_dict=self.ema.module.state_dict() if self.ema else None,
                ema_updates=int(self.ema.n_averaged) if self.ema else 0,
                optimizer=self.optimizer.state_dict(),
                scaler=self.precision.state_dict(),
            )
        )

    def _load_state(self, state):
        self.model.load_state_dict(state["state_dict"])
        optim.load_state(self.optimizer, state["optimizer"])
        self.precision.load_state_dict(state["scaler"])
        if self.ema:
            averaged = state["ema_state_dict"]
            self.ema.module.load_state_dict(state["state_dict"] if averaged is None else averaged)
            self.ema.n_averaged.fill_(state["ema_updates"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.best_acc1, self.best_epoch = state["best_acc1"], state["best_epoch"]

    def _save(self, counts=None, is_best=False):
        """Begin to write the state of this very step, after all ranks know that their losses are finite.

        Rank 0 does it, beside the steps that follow; `counts` are those of a validation that was just done.
        """
        with self.throughput.paused():
            self.group.go_on(error=self._non_finite())
            self.saved_at, self.saved_place = time.perf_counter(), (self.epoch, self.step)
            if self.world.is_main:
                self.watch.at("writing the checkpoint before this one")
                self.writer.wait()
                self.watch.at("saving")
                steps, done = self.plan.steps_per_epoch, None
                if counts is not None or self.job.splits.val is None:
                    done = functools.partial(self._epoch_saved, self.epoch) if self.step == 0 else None
                acc1 = counts and counts.percent(1)
                snapshot = checkpoint.Snapshot(self.state(), self.epoch * steps + self.step, is_best, acc1, done)
                self.writer.save(snapshot)
                self.watch.at("saving")

    def _epoch_saved(self, epochs_done):
        self.say.epoch_saved(self.job.folder / checkpoint.NEWEST, epochs_done, self.plan.steps_per_epoch)

    def _wait_for_writer(self):
        """Return when the last checkpoint is on the disk; one that is not ends all ranks with the reason."""
        self.watch.at("writing the last checkpoint")
        error = self.writer.wait()
        self.watch.at(watch.WAITING)
        self.group.go_on(error=error)

    def _stop(self, agreed):
        """End all ranks with the checkpoint of this step."""
        self._save()
        self._wait_for_writer()
        if agreed == distributed.RESTART:
            sys.exit(cli.EXIT_RESTART)
        self.say.line(f"stopped at epoch {self.epoch + 1} step {self.step}; --resume auto continues there")
        sys.exit(130 if self.interrupt.signal == signal.SIGINT else cli.EXIT_TERMINATED)

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
            if loader_of and (reading := loader_of.reading()):
                words.append(f"reading {', '.join(str(images.path(i)) for i in reading)}")
        return ", ".join(words)

    def _leave(self, report_of_hang):
        if report_of_hang:
            print(f"error: {report_of_hang}", file=sys.stderr, flush=True)
        self.writer.wait(timeout=_LAST_WRITE_S)
        signals.leave_now(1)

    def _images_per_s_of_machines(self):
        """Images per second of each machine, by the clocks of its own ranks; every machine prints its own."""
        world, speeds = self.world, [0.0] * self.world.machines
        share = len(self.my_micro_batches) / self.plan.num_micro_batches
        speeds[world.machine] = self.throughput.images_per_s * share
        speeds = self.group.sum(speeds)
        if world.machines > 1 and world.local_rank == 0:
            text = f"machine {world.machine} of {world.machines}: {speeds[world.machine]:.3f} images/sec"
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
            val_images=counts and counts.seen,
            device=self.device.describe(),
            ranks=self.world.size,
            amp=self.amp_type,
            memory_format=self.memory_format,
            torch=torch.__version__,
            python=platform.python_version(),
            folder=str(self.job.folder),
        )
        self.say.write(report.SUMMARY, summary)
        self.say.line(
            f"throughput leaves out the first {self.throughput.left_out} steps and all evaluation; "
            f"files are in {self.job.folder}"
        )
        self.say.final(fps, self.best_acc1, duration_s)
        return summary
