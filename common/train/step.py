"""The network and all that changes with it: what an optimizer step does to it, what a checkpoint keeps of it.

Legend: m is the index of a micro-batch among all of its step.
"""

import contextlib

import torch

from common.data import sampling
from common.device import amp
from common.device import device as devices
from common.evaluation.torch_classifier import Normalizer, TorchClassifier
from common.train import checkpoint, losses, meters, optim, reduction, schedules


def _compiled(model):
    """torch.compile with eager's random numbers, so that a step draws the same dropout either way."""
    return torch.compile(model, dynamic=False, options={"fallback_random": True})


class TrainStep:
    """Network, averages of its weights, optimizer, mixed precision and reduction of one rank.

    Args:
      job: RunSetup.
      world, device, group: place of this rank.

    Attributes:
      model: the network as checkpoints name it.
      window: meters.LossMeter of the losses since the last progress line.
      my_micro_batches: indices of this rank's micro-batches of a step.
    """

    def __init__(self, job, world, device, group):
        self.config, self.plan, self.device, self.aux_weight = job.config, job.plan, device, job.spec.aux_weight
        config = self.config
        self.memory_format = device.memory_format(job.memory_format)
        self.amp_type = device.amp_type(config.amp, config.amp_dtype)

        # Initial weights are a function of the seed, so all ranks start equal.
        torch.manual_seed(config.seed)
        self.model = job.spec.build(**job.build_options)
        if job.weights is not None:
            self.model.load_state_dict(job.weights)
        self.model.to(device.torch_device, memory_format=devices.torch_memory_format(self.memory_format))
        self.ema = optim.make_ema(self.model, config.ema)
        self.model, self.optimizer, self.precision = amp.prepare(
            self.model, optim.make_optimizer(self.model, config, device), device.kind, self.amp_type, config
        )
        self.lr_at = schedules.make(config, self.plan.steps_per_epoch, job.schedules)
        self.mix = losses.mixer(config, job.build_options["num_classes"])
        self.reduction = reduction.REDUCTIONS[config.reduce](self.model, group, self.plan.num_micro_batches)
        self.my_micro_batches = self.plan.micro_batches_of(world.rank, world.size)
        self.normalize = Normalizer(job.spec, device, self.memory_format)
        self.window = meters.LossMeter()
        if job.state is not None:
            self._load_state(job.state)
        self.network = self._wrapped(_compiled(self.model) if config.compile else self.model, world)

    def _wrapped(self, network, world):
        """DistributedDataParallel where gradients are summed by all-reduce; its buffers are ours to average."""
        if world.size == 1 or self.config.reduce == "exact":
            return network
        ids = None if self.device.kind == "cpu" else [self.device.index]
        return torch.nn.parallel.DistributedDataParallel(
            network,
            device_ids=ids,
            broadcast_buffers=False,
            gradient_as_bucket_view=not optim.keeps_gradients(self.optimizer),
        )

    def engine(self):
        """TorchClassifier of the weights that validation scores: the averages where there are some."""
        model = self.ema.module if self.ema else self.model
        return TorchClassifier(model, self.normalize, self.device, self.precision.evaluation_type)

    def train_step(self, epoch, step, batches):
        """One optimizer step over this rank's micro-batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(epoch, step)
        divisor = self.reduction.loss_divisor(len(self.my_micro_batches), self.plan.num_micro_batches)
        self.optimizer.zero_grad()  # to None or to zero, as the optimizer has it
        self.reduction.begin_step()
        for m, batch in zip(self.my_micro_batches, batches, strict=True):
            # Dropout and mixing are functions of (seed, epoch, step, m): any rank, any restart draws the same.
            torch.manual_seed(sampling.step_seed(self.config.seed, epoch, step, m))
            is_last = m == self.my_micro_batches[-1]
            with self._gradients_travel(is_last):
                with self.precision.forward():
                    loss = self._micro_batch_loss(epoch, step, batch)
                self.precision.backward(loss / divisor, self.optimizer, is_last)
            self.reduction.micro_batch_done(is_last)
        self.reduction.end_step(len(self.my_micro_batches))
        if self.config.clip_grad:
            parameters = self.precision.unscaled_parameters(self.model, self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)
        self.precision.step(self.optimizer)
        if self.ema:
            self.ema.update_parameters(self.model)

    def _gradients_travel(self, is_last):
        """DDP sends gradients with the last micro-batch of a rank only."""
        if is_last or not isinstance(self.network, torch.nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def _micro_batch_loss(self, epoch, step, batch):
        images = self.normalize(batch.pixels_NHWC)
        targets = labels = batch.labels_N.to(self.device.torch_device, non_blocking=True)
        if self.mix:
            images, targets = self.mix(images, labels)
        outputs = self.network(images)
        loss = losses.training_loss(outputs, targets, self.config, self.aux_weight)
        self.window.add(epoch, step, loss, outputs, labels)
        return loss

    def state(self):
        """What a later TrainStep needs to go on; plain values and host tensors only."""
        return checkpoint.on_host(
            dict(
                memory_format=self.memory_format,
                amp_type=self.amp_type,
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
