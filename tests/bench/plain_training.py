"""Baseline of the training step: PyTorch's ImageNet example.

Float batches normalized by the dataloader workers, NCHW, torchvision's network, one `.item()` per meter and step.
"""

import torch
import torchvision
from torch.utils import data
from torchvision import transforms


class PlainTraining:
    """A training run that does one step per call.

    Args:
      root: dataset root with train/.
      batch_size: images per step.
      image_size: side of the input, pixels.
      workers: dataloader workers.
    """

    def __init__(self, root, batch_size, image_size, workers):
        dataset = torchvision.datasets.ImageFolder(
            f"{root}/train",
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(image_size),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
                ]
            ),
        )
        self.loader = data.DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True)
        self.model = torchvision.models.inception_v3(
            weights=None, init_weights=False, aux_logits=True, num_classes=len(dataset.classes)
        ).train()
        self.criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.045, momentum=0.9, weight_decay=2e-4)
        self.batches = iter(self.loader)
        self.losses, self.top1, self.top5 = [], [], []

    def _next(self):
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)

    def step(self):
        images, target = self._next()
        output, aux = self.model(images)
        loss = self.criterion(output, target) + 0.4 * self.criterion(aux, target)
        hits = output.topk(min(5, output.shape[1]), 1).indices == target[:, None]
        self.losses.append(loss.item())
        self.top1.append(hits[:, :1].any(1).float().mean().item())
        self.top5.append(hits.any(1).float().mean().item())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def close(self):
        del self.batches
