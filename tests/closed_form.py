"""Weights from a closed form, for golden values that no random generator can change. Needs numpy only."""

import numpy as np


def uniform(name, shape, low=-1.0, high=1.0):
    """float32 array of `shape`, spread evenly over [low, high): an integer hash of the name and the position."""
    seed = sum((i + 1) * byte for i, byte in enumerate(name.encode()))
    value = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64) * np.uint64(0x9E3779B1) + np.uint64(seed)
    for shift, factor in ((15, 0x85EBCA77), (13, 0xC2B2AE3D)):
        value &= np.uint64(0xFFFFFFFF)
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    value = (value & np.uint64(0xFFFFFFFF)) ^ ((value & np.uint64(0xFFFFFFFF)) >> np.uint64(16))
    return (low + (high - low) * (value / 2.0**32)).astype(np.float32).reshape(shape)


def tensor(name, shape):
    """A weight in torch's terms, such that activations keep their size: kernels ~ fan-in ** -0.5, mild batch norm."""
    last = name.rpartition(".")[2]
    if last == "weight" and len(shape) > 1:
        bound = (4.2 / np.prod(shape[1:])) ** 0.5
        return uniform(name, shape, -bound, bound)
    if last == "weight":
        return uniform(name, shape, 0.7, 1.0)
    if last == "running_var":
        return uniform(name, shape, 0.5, 2.0)
    return uniform(name, shape, -0.1, 0.1)


def fill(state_dict):
    """Overwrite every tensor of a torch state dict in place, batch counters excepted."""
    import torch

    for name, value in state_dict.items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(tensor(name, tuple(value.shape))))


def image(size):
    """float32 [1, 3, size, size] in [-1, 1): a smooth picture with some texture."""
    y, x = np.mgrid[0:size, 0:size] / size
    planes = [0.6 * np.sin((4 + c) * x + 3 * c) * np.cos((5 - c) * y) for c in range(3)]
    return (np.stack(planes)[None] + 0.3 * uniform("image", (1, 3, size, size))).astype(np.float32)
