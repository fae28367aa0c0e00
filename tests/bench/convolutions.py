"""The limit of a training step: its convolutions alone, forward and backward, each with inputs of its own shape."""

import torch
from torch import nn


class Convolutions:
    """All convolutions of a network in channels_last; a training step's worth of them per call.

    Args:
      network: any.
      batch_size: images per step.
      image_size: side of the input, pixels.
    Attributes:
      flops: of a call, a multiplication with its addition counted as two.
    """

    def __init__(self, network, batch_size, image_size):
        self._calls, self.flops, tensors = [], 0, {}
        network = network.to(memory_format=torch.channels_last).train()
        hooks = [
            module.register_forward_hook(lambda *call: self._add(*call, tensors))
            for module in network.modules()
            if isinstance(module, nn.Conv2d)
        ]
        with torch.no_grad():
            network(self._tensor((batch_size, 3, image_size, image_size), tensors))
        for hook in hooks:
            hook.remove()

    def _add(self, convolution, inputs, output, tensors):
        image, gradient = (self._tensor(tuple(each.shape), tensors) for each in (inputs[0], output))
        passes = 3 if self._calls else 2  # the first one needs no gradient of its input
        macs = output.numel() * convolution.weight[0].numel()
        self.flops += 2 * macs * passes
        self._calls.append((convolution, image, gradient, passes == 3))

    @staticmethod
    def _tensor(shape, tensors):
        if shape not in tensors:
            tensors[shape] = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        return tensors[shape]

    def step(self):
        for convolution, image, gradient, is_inner in self._calls:
            output = convolution(image.detach().requires_grad_(is_inner))
            convolution.weight.grad = None
            output.backward(gradient)

    def close(self):
        pass
