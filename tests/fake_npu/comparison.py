"""What training made, whatever the device: weights, averages, momentum, position; not which kernel made it."""

from test_training import differences, final

_KEYS = ("state_dict", "ema_state_dict", "ema_updates", "epoch", "step", "best_acc1", "best_epoch")


def same_training(one, other):
    """Names of the entries of two run folders' checkpoints that differ in any bit."""
    a, b = final(one), final(other)
    return [
        *differences({k: a[k] for k in _KEYS}, {k: b[k] for k in _KEYS}),
        *differences(a["optimizer"]["state"], b["optimizer"]["state"], "/momentum"),
    ]
