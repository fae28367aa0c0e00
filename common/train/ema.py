"""Exponential moving average of the weights: torch's own, over parameters and buffers."""

from torch.optim import swa_utils


def make_ema(model, decay):
    """An AveragedModel that follows `model`, or None where decay is 0."""
    if not decay:
        return None
    return swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True)
