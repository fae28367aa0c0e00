"""One optimizer step: network, optimizer, mixed precision and reduction of a rank, and their part of a checkpoint.

Legend: m is the index of a micro-batch among all micro-batches of its step, N batch, K classes.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from common.data import sampling
from common.data.batch import Batch
from common.device import amp
from common.device import device as devices
from common.distributed import Group
from common.evaluation.torch_classifier import Normalizer, TorchClassifier
from common.train import checkpoint, freeze, losses, optim, reduction
from common.train.run_setup import RunSetup


def step_seed(seed: int, epoch: int, step: int, micro_batch: int) -> int:
    """Seed of dropout and of mixup and cutmix in one micro-batch of a step."""
    return sampling.stream_seed(sampling.STEP, seed, epoch, step, micro_batch)


class StepResult(NamedTuple):
    """What a rank measured in one step; tensors stay on the device.

    Attributes:
      lr: learning rate of the step.
      losses: scalar loss of each micro-batch.
      correct: hits at top-1 of each micro-batch.
      num_images: images of this rank's micro-batches.
    """

    lr: float
    losses: list[torch.Tensor]
    correct: list[torch.Tensor]
    num_images: int


class TrainStep:
    """Network, moving average, optimizer, mixed precision and gradient reduction of one rank.

    Attributes:
      model: the network as checkpoints name it; `network` is the same one, compiled and wrapped by DDP.
      micro_batches: indices of this rank's micro-batches of a step.
    """

    def __init__(self, setup: RunSetup, group: Group) -> None:
        config, device, world = setup.config, group.device, group.world
        self.setup, self.device = setup, device
        self.threads = devices.set_threads(config.threads, world.local_size)
        self.memory_format = device.memory_format(setup.memory_format)
        self.amp_type = device.amp_type(config.amp, config.amp_dtype)

        # Initial weights are a function of the seed, so all ranks start equal.
        torch.manual_seed(config.seed)
        model = setup.spec.build(**setup.build_options)
        if setup.weights is not None:
            model.load_state_dict(setup.weights)
        device.move(model, self.memory_format)
        self._freeze = freeze.Freeze(model, setup.spec, config.freeze, config.freeze_norm)
        self.ema = optim.make_ema(model, config.ema)
        optimizer = optim.make_optimizer(model, config, device, setup.spec.classifiers)
        self.model, self.optimizer, self.precision = amp.prepare(model, optimizer, device.kind, self.amp_type, config)
        self.mixer = losses.mixer(config, setup.build_options["num_classes"])
        self.reduction = reduction.REDUCTIONS[config.reduce](
            self.model, self._freeze.norms, group, setup.plan.num_micro_batches
        )
        self.micro_batches = setup.plan.micro_batches_of(world.rank, world.size)
        self.normalize: Callable[[torch.Tensor], torch.Tensor] = Normalizer(setup.spec, device, self.memory_format)
        if setup.state is not None:
            self._load_state(setup.state)
        self.network = self._wrap(world.size)

    def _wrap(self, world_size: int) -> nn.Module:
        """The model, compiled on request, in DistributedDataParallel where gradients are summed by all-reduce."""
        network: Any = self.model
        if self.setup.config.compile:  # fallback_random: eager's random numbers, so that dropout is the same either way
            network = torch.compile(network, dynamic=False, options={"fallback_random": True})
        if world_size == 1 or self.setup.config.reduce == "exact":
            return network
        return nn.parallel.DistributedDataParallel(
            network,
            device_ids=None if self.device.kind == "cpu" else [self.device.index],
            broadcast_buffers=False,  # the reduction averages them
            gradient_as_bucket_view=not optim.keeps_gradients(self.optimizer),
        )

    def train(self) -> None:
        """Training mode, after an evaluation; frozen parts stay in evaluation mode."""
        self._freeze.train(self.network)

    def engine(self) -> TorchClassifier:
        """Evaluation engine of the averaged weights where --ema is on, else of the weights."""
        model = self.ema.module if self.ema else self.model
        return TorchClassifier(model, self.normalize, self.device, self.precision.evaluation_type)

    def train_classifier_alone(self) -> TorchClassifier:
        """Take features [N, D], the input of the classifier, in place of pixels from now on.

        Returns:
          evaluation engine that takes features too.
        """
        self.normalize = lambda features_ND: features_ND.to(self.device.torch_device)
        name = self.setup.spec.classifiers[0]
        dropout = nn.Dropout(self.setup.build_options.get("dropout", 0.0))
        self.network = nn.Sequential(dropout, self.model.get_submodule(name))
        model = (self.ema.module if self.ema else self.model).get_submodule(name)
        return TorchClassifier(model, self.normalize, self.device, self.precision.evaluation_type)

    def __call__(self, epoch: int, step: int, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this rank's micro-batches; epoch and step are counted from 0."""
        config, plan = self.setup.config, self.setup.plan
        result = StepResult(self.setup.lr_at(epoch, step), [], [], sum(len(batch.labels_N) for batch in batches))
        for group in self.optimizer.param_groups:
            group["lr"] = result.lr * group.get("lr_scale", 1)
        divisor = self.reduction.loss_divisor(len(self.micro_batches), plan.num_micro_batches)
        self.optimizer.zero_grad()
        self.reduction.begin_step()
        for m, batch in zip(self.micro_batches, batches, strict=True):
            # Dropout and mixing are functions of (seed, epoch, step, m): equal on any rank and after any restart.
            torch.manual_seed(step_seed(config.seed, epoch, step, m))
            is_last = m == self.micro_batches[-1]
            with self._gradient_sync(is_last):
                with self.precision.forward():
                    loss, correct = self._loss(batch)
                self.precision.backward(loss / divisor, self.optimizer, is_last)
            self.reduction.micro_batch_done(is_last)
            result.losses.append(loss.detach())
            result.correct.append(correct)
        self.reduction.end_step(len(self.micro_batches))
        if config.clip_grad:
            parameters = self.precision.unscaled_parameters(self.model, self.optimizer)
            nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        self.precision.step(self.optimizer)
        if self.ema:
            self.ema.update_parameters(self.model)
        return result

    def _gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP reduces gradients with the last micro-batch of a rank only."""
        if is_last or not isinstance(self.network, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, hits at top-1) of a micro-batch, scalars."""
        images = self.normalize(batch.pixels_NHWC)
        targets = labels_N = batch.labels_N.to(self.device.torch_device, non_blocking=True)
        if self.mixer:
            images, targets = self.mixer(images, labels_N)
        outputs = self.network(images)
        loss = losses.training_loss(outputs, targets, self.setup.config, self.setup.spec.aux_weight)
        logits_NK = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        return loss, (logits_NK.detach().argmax(dim=1) == labels_N).sum()

    def state(self) -> dict[str, Any]:
        """What a later TrainStep needs to continue; plain values and host tensors only."""
        return checkpoint.on_host(
            dict(
                threads=self.threads,
                memory_format=self.memory_format,
                amp_type=self.amp_type,
                state_dict=self.model.state_dict(),
                ema_state_dict=self.ema.module.state_dict() if self.ema else None,
                ema_updates=int(self.ema.n_averaged) if self.ema else 0,
                optimizer=self.optimizer.state_dict(),
                scaler=self.precision.state_dict(),
            )
        )

    def _load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["state_dict"])
        optim.load_state(self.optimizer, state["optimizer"])
        self.precision.load_state_dict(state["scaler"])
        if self.ema:
            averaged = state["ema_state_dict"]
            self.ema.module.load_state_dict(state["state_dict"] if averaged is None else averaged)
            self.ema.n_averaged.fill_(state["ema_updates"])
