"""Baseline of the training step: timm's network in channels_last, as timm's train.py trains it on a CPU."""

import torch


class TimmTraining:
    """A training run that does one step per call, on one batch in memory.

    Args:
      name: of the network in timm. Its Inception v3 has no auxiliary head.
      batch_size: images per step.
      image_size: side of the input, pixels.
    """

    def __init__(self, name, batch_size, image_size):
        import timm
        from timm.optim import create_optimizer_v2

        self.model = timm.create_model(name, num_classes=1000).to(memory_format=torch.channels_last).train()
        self.optimizer = create_optimizer_v2(self.model, "sgd", lr=0.045, weight_decay=2e-4, momentum=0.9)
        self.criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        images = torch.randn(batch_size, 3, image_size, image_size)
        self.images, self.target = images.contiguous(memory_format=torch.channels_last), torch.arange(batch_size)

    def step(self):
        loss = self.criterion(self.model(self.images), self.target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def close(self):
        pass
