"""Training recipe of Inception v4 on ImageNet.

    python inception_v4/train.py --data /data/imagenet --epochs 240 --amp

One device's share of the published eight-device run (batch 1024, lr 0.484375, cosine over 240 epochs, label smoothing
0.1): batch 128 and lr 0.0605.
"""

from common.config import FINETUNE, PROBE, Recipe, TrainConfig

RECIPES = {
    "default": Recipe(TrainConfig(batch_size=128, lr=0.0605), "1 device", "no accuracy is published for it"),
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
