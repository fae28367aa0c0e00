"""The training loss: smoothed cross entropy, or binary cross entropy, plus the share of an auxiliary head."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from common.config import TrainConfig


def smoothed_cross_entropy(
    logits_NK: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0, smoothing_targets: str = "all"
) -> torch.Tensor:
    """Mean cross entropy against smoothed targets.

    Args:
      logits_NK: scores [N, K]; computed in float32.
      targets: class indices int64 [N], or probabilities [N, K] (mixup, cutmix; only with "all").
      smoothing: share s of the target that is spread.
      smoothing_targets: "all": every class gets s/K, the label 1 - s + s/K (torch's definition); "others": every other
        class gets s/(K-1), the label 1 - s (MindSpore's CrossEntropySmooth).
    Returns:
      scalar tensor.
    """
    return F.cross_entropy(
        logits_NK.float(), targets, label_smoothing=torch_smoothing(smoothing, smoothing_targets, logits_NK.shape[1])
    )


def binary_cross_entropy(
    logits_NK: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0, threshold: float | None = None
) -> torch.Tensor:
    """Mean binary cross entropy over images and classes, as timm's; https://arxiv.org/abs/2110.00476, section 3.

    Args:
      logits_NK: scores; computed in float32.
      targets: class indices int64 [N], or probabilities [N, K].
      smoothing: share s: the target p of a class becomes (1 - s) p + s/K.
      threshold: targets above it, after the smoothing, are 1, the others 0.
    """
    num_classes = logits_NK.shape[1]
    targets_NK = F.one_hot(targets, num_classes) if targets.dim() == 1 else targets
    targets_NK = targets_NK * (1 - smoothing) + smoothing / num_classes
    if threshold is not None:
        targets_NK = targets_NK.gt(threshold)
    return F.binary_cross_entropy_with_logits(logits_NK.float(), targets_NK.float())


def torch_smoothing(smoothing: float, smoothing_targets: str, num_classes: int) -> float:
    """The share s that makes torch's rule (1 - s + s/K, s/K) equal to the named rule.

    s/(K-1) on the other classes alone is the same as s * K/(K-1) on all of them.
    """
    return smoothing * num_classes / (num_classes - 1) if smoothing_targets == "others" else smoothing


def effective_smoothing(config: TrainConfig, num_classes: int) -> float:
    """torch_smoothing of a TrainConfig: what the evaluation's loss is smoothed with."""
    return torch_smoothing(config.label_smoothing, config.smoothing_targets, num_classes)


def training_loss(
    outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    targets: torch.Tensor,
    config: TrainConfig,
    aux_weight: float,
) -> torch.Tensor:
    """Loss of a micro-batch: main + aux_weight * auxiliary, both of the same kind and smoothed.

    Args:
      outputs: logits [N, K], or (logits, aux_logits) of a network with an auxiliary head.
      targets: see smoothed_cross_entropy.
    """

    def loss(logits_NK: torch.Tensor) -> torch.Tensor:
        if config.bce:
            smoothing = effective_smoothing(config, logits_NK.shape[1])
            return binary_cross_entropy(logits_NK, targets, smoothing, config.bce_target_thresh)
        return smoothed_cross_entropy(logits_NK, targets, config.label_smoothing, config.smoothing_targets)

    if isinstance(outputs, torch.Tensor):
        return loss(outputs)
    main, aux = outputs
    return loss(main) + aux_weight * loss(aux)


Mixer = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def mixer(config: TrainConfig, num_classes: int) -> Mixer | None:
    """torchvision's mixup and/or cutmix as a function (images, labels) -> (images, probabilities), or None when off.

    Both draw from torch's global generator, which the trainer seeds for every micro-batch.
    """
    if not config.mixup and not config.cutmix:
        return None
    from torchvision.transforms import v2  # takes a second

    kinds = [
        kind(alpha=alpha, num_classes=num_classes)
        for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
        if alpha
    ]
    return kinds[0] if len(kinds) == 1 else v2.RandomChoice(kinds)
