"""An nn.Module as a function from uint8 pixels to logits; normalization runs on the device."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from common.data.batch import Array
from common.data.transforms import NormalizeInto
from common.device import amp, cann_failure
from common.device import device as devices
from common.errors import RunError
from common.evaluation.engines import streams
from common.evaluation.metrics import STEPS_OF_NOTE
from common.spec import ModelSpec


class Normalizer:
    """uint8 batches -> normalized float32 images on the device, in the network's memory layout."""

    def __init__(self, spec: ModelSpec, device: devices.Device, memory_format: str) -> None:
        self._device = device.torch_device
        self._memory_format = devices.torch_memory_format(memory_format)
        self._mean = torch.tensor(spec.mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=self._device).view(1, 3, 1, 1)

    def __call__(self, pixels_NHWC: torch.Tensor) -> torch.Tensor:
        """[N, H, W, 3] on the host -> [N, 3, H, W], with the arithmetic of torchvision's ToTensor and Normalize."""
        pixels = pixels_NHWC.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return pixels.to(torch.float32, memory_format=self._memory_format).div_(255).sub_(self._mean).div_(self._std)


class TorchClassifier:
    """uint8 pixels [N, H, W, 3] -> float32 logits [N, K] on the host; puts the network in evaluation mode.

    Args:
      normalize: from a batch on the host to the input of the network.
      compiled_batch: the network is compiled: smaller batches are filled up to this size, so that it sees one shape.
      threads: of a CPU, for `streams` calls at a time together; 0: one call at a time, on torch's threads.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        normalize: Callable[[torch.Tensor], torch.Tensor],
        device: devices.Device,
        amp_type: str | None = None,
        compiled_batch: int = 0,
        threads: int = 0,
    ) -> None:
        self.model, self._normalize, self._device, self._amp_type = model, normalize, device, amp_type
        self._compiled_batch, self._threads, self.streams = compiled_batch, threads, streams(threads)

    def with_normalization(self, normalize_into: NormalizeInto) -> "TorchClassifier":
        """The same network with another normalization, computed on the host."""

        def normalize(pixels_NHWC: torch.Tensor) -> torch.Tensor:
            count, height, width, channels = pixels_NHWC.shape
            images = np.empty((count, channels, height, width), np.float32)
            for planes, pixels in zip(images, pixels_NHWC.numpy(), strict=True):
                normalize_into(planes, pixels)
            return torch.from_numpy(images).to(self._device.torch_device)

        return TorchClassifier(self.model, normalize, self._device, self._amp_type)

    def with_batch_statistics(self) -> "TorchClassifier":
        """A copy of the network that normalizes each batch by its own statistics, as without eval(); no dropout."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean = module.running_var = None
        return TorchClassifier(model, self._normalize, self._device, self._amp_type)

    def __call__(self, pixels_NHWC: Array) -> np.ndarray:
        self.model.eval()
        pixels_NHWC = torch.as_tensor(pixels_NHWC)
        if self._threads:
            torch.set_num_threads(self._threads // max(1, self.streams))
        count = len(pixels_NHWC)
        if count < self._compiled_batch:
            filling = pixels_NHWC.new_zeros(self._compiled_batch - count, *pixels_NHWC.shape[1:])
            pixels_NHWC = torch.cat([pixels_NHWC, filling])
        try:
            with torch.inference_mode(), amp.autocast(self._device.kind, self._amp_type):
                return self.model(self._normalize(pixels_NHWC)).float().cpu().numpy()[:count]
        except Exception as error:
            if not self._compiled_batch or self._device.kind != "npu":
                raise
            raise RunError(f"--compile: {cann_failure.explain(str(error))} (torchair); leave it out") from error


def norm_momentum(model: nn.Module) -> float | None:
    """Momentum of the running statistics of batch norm, or None for a network without them."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return next((norm.momentum for norm in norms if norm.track_running_stats), None)


def short_training(model: nn.Module) -> tuple[int, float | None]:
    """(Steps, momentum of batch norm) of a checkpoint for metrics.note_on_loss; (0, None): nothing to say."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    steps = max((int(norm.num_batches_tracked) for norm in norms if norm.num_batches_tracked is not None), default=0)
    return (steps, norm_momentum(model)) if 0 < steps <= STEPS_OF_NOTE else (0, None)
