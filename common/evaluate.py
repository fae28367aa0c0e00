"""One evaluator for training, eval.py and every deployment engine: each image is counted exactly once."""

import sys

import numpy as np
import torch

from common import device as devices
from common import device_amp
from common.data.decode import BadImage
from common.distributed import RUN, STOP
from common.errors import RunError
from common.metrics import Counts


class Normaliser:
    """uint8 batches -> normalised float32 images on the device, in the network's memory layout."""

    def __init__(self, spec, device, memory_format):
        self._device = device.torch
        self._memory_format = devices.torch_memory_format(memory_format)
        self._mean = torch.tensor(spec.mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=self._device).view(1, 3, 1, 1)

    def __call__(self, pixels_NHWC):
        """uint8 [N, H, W, 3] on the host -> float32 [N, 3, H, W], with the arithmetic of ToTensor and Normalize."""
        pixels = pixels_NHWC.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        return pixels.to(torch.float32, memory_format=self._memory_format).div_(255).sub_(self._mean).div_(self._std)


class TorchEngine:
    """Logits of an nn.Module: uint8 batch -> float array [N, K] on the host."""

    def __init__(self, model, normalise, device, amp_type=None):
        self.model, self._normalise, self._device, self._amp_type = model, normalise, device, amp_type

    def __call__(self, pixels_NHWC):
        self.model.eval()
        with torch.inference_mode(), device_amp.autocast(self._device, self._amp_type):
            return self.model(self._normalise(pixels_NHWC)).float().cpu().numpy()


def evaluate(engine, batches, num_images, group, smoothing=0.0, interrupted=lambda: False):
    """Score a split.

    Args:
      engine: function from uint8 [N, H, W, 3] to logits [N, K] on the host.
      batches: EvalLoader of this rank's share.
      num_images: images in the whole split.
      group: distributed.Group; counts are summed over its ranks once, at the end.
      smoothing: label smoothing of the reported loss.
      interrupted: asked before every batch; True ends the evaluation on all ranks.
    Returns:
      Counts over all ranks, or None when a rank was interrupted.
    Raises:
      BadImage: a file does not decode (unless the loader skips those).
      RunError: a score is NaN.
    """
    counts, error, stopped = Counts(), None, False
    try:
        for batch in batches:
            if stopped := interrupted():
                break
            batch.raise_if_failed()
            counts.skipped += len(batch.bad)
            for path, reason in batch.bad:
                print(f"skipped: {path} ({reason})", file=sys.stderr, flush=True)
            if len(batch.labels_N):
                logits_NK = engine(batch.pixels_NHWC)
                if np.isnan(logits_NK).any():
                    raise RunError(
                        "the network's scores of validation images are not numbers (NaN): the training "
                        "diverged; lower --lr, or evaluate an earlier checkpoint"
                    )
                counts.add(logits_NK, batch.labels_N.numpy(), smoothing)
    except (BadImage, RunError) as found:
        error = found
    if group.go_on(STOP if stopped else RUN, error):
        return None
    *correct, seen, skipped, loss_sum = group.sum([*counts.correct, counts.seen, counts.skipped, counts.loss_sum])
    total = Counts(np.array(correct, np.int64), int(seen), int(skipped), loss_sum)
    assert total.seen + total.skipped == num_images, f"counted {total.seen} + {total.skipped} of {num_images} images"
    return total
