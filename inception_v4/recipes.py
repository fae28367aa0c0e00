"""Training recipe of Inception v4 on ImageNet.

    python inception_v4/train.py --data /data/imagenet --epochs 240 --amp

One device's share of the published eight-device run (batch 1024, lr 0.484375, cosine over 240 epochs, label smoothing
0.1): batch 128 and lr 0.0605.

`modern` is common.config.MODERN, which names source and published gain of each ingredient. With a part of them
(ImageNet top-1): 80.14 TensorFlow's, 80.8 PaddleClas' (mixup 0.2, cosine), 80.98 mindcv's (AutoAugment, random erasing
0.25, cosine, 5 warm-up epochs).
"""

from common.config import FINETUNE, MODERN, PROBE, Recipe, TrainConfig

RECIPES = {
    "default": Recipe(TrainConfig(batch_size=128, lr=0.0605), "1 device", "no accuracy is published for it"),
    "modern": Recipe(
        TrainConfig(**MODERN, batch_size=1024, lr_schedule="cosine-step"),
        "8 devices",
        "from scratch; gained 4.7 points of top-1 with ResNet-50 (reported), not measured here",
    ),
    # features.18 is the second reduction (17 -> 8 pixels).
    "finetune": Recipe(
        TrainConfig(**FINETUNE, lr_schedule="cosine-step", freeze="features.18"),
        "1 device",
        "some hundred photographs, --pretrained",
    ),
    "probe": Recipe(
        TrainConfig(**PROBE, lr_schedule="cosine-step"),
        "1 device",
        "the same, the classifier alone, in a minute or two",
    ),
}
