"""Training recipes of Inception v3 on ImageNet, selected with `--recipe NAME`; the launchers in test/ name theirs.

    bash inception_v3/test/train_full_8p.sh --data_path=/data/imagenet
    python inception_v3/train.py --data /data/imagenet --recipe full_1p

Images of a step per machine, SGD with momentum 0.9, learning rate falling as a cosine over the epochs, label smoothing
0.1, loss = main + 0.4 x auxiliary. Reported numbers: Ascend 910, torch 1.8, apex O2.

`modern` is common.config.MODERN, which names source and published gain of each ingredient. Nobody has published this
network with all of them. With a part of them (ImageNet top-1): 77.87 TensorFlow's, 78.41 Gluon's and 78.77 with mixup
0.2, 79.1 PaddleClas' (mixup 0.2, cosine), 79.25 mindcv's (AutoAugment, random erasing 0.25, cosine, 5 warm-up epochs).
"""

import dataclasses

from common.config import FINETUNE, MODERN, PROBE, Recipe, TrainConfig

_ONE = TrainConfig(batch_size=256, epochs=240, lr=0.045, weight_decay=2e-4, label_smoothing=0.1, loss_scale="1024")
_FULL_1P = dataclasses.replace(_ONE, amp=True, workers=32, print_freq=100)
_FULL_8P = dataclasses.replace(
    _FULL_1P, batch_size=2048, lr=1.2, weight_decay=1e-4, loss_scale="128", seed=49, workers=128, print_freq=30
)
# For 500 steps instead of ImageNet's hundreds of thousands: an adaptive optimizer, crops that keep most of the image,
# no dropout. 107 pixels is the smallest input whose last feature map is 2x2: with 1x1, batch norm over 16 is too noisy.
_QUICKSTART = TrainConfig(
    batch_size=16,
    epochs=8,
    image_size=107,
    optimizer="adamw",
    lr=0.002,
    lr_schedule="cosine-step",
    warm_up_epochs=1,
    min_crop=0.5,
    dropout=0.0,
    label_smoothing=0.0,
    print_freq=62,
)
_8P, _SPEED_1P, _SPEED_8P = "8 NPUs", "942 images/s (reported)", "6823 images/s (reported)"

RECIPES = {
    "default": Recipe(_ONE, "1 device", "as full_1p, without mixed precision"),
    "full_1p": Recipe(_FULL_1P, "1 NPU", _SPEED_1P),
    "full_8p": Recipe(_FULL_8P, _8P, f"top-1 78.12 %, {_SPEED_8P}"),
    "performance_1p": Recipe(
        dataclasses.replace(_FULL_1P, epochs=1, print_freq=10), "1 NPU", f"one epoch, {_SPEED_1P}"
    ),
    "performance_8p": Recipe(dataclasses.replace(_FULL_8P, epochs=1, lr=0.045), _8P, f"one epoch, {_SPEED_8P}"),
    "quickstart": Recipe(_QUICKSTART, "CPU", "drawn images of tools/make_sample_data.py: top-1 93 to 96 % (measured)"),
    "modern": Recipe(
        TrainConfig(**MODERN, batch_size=1024, lr_schedule="cosine-step"),
        "8 devices",
        "from scratch; gained 4.7 points of top-1 with ResNet-50 (reported), not measured here on ImageNet",
    ),
    "finetune": Recipe(
        TrainConfig(**FINETUNE, lr_schedule="cosine-step", freeze="Mixed_7a"),
        "1 device",
        "some hundred photographs, --pretrained; ants and bees: 97.4 % (measured)",
    ),
    "probe": Recipe(
        TrainConfig(**PROBE, lr_schedule="cosine-step"),
        "1 device",
        "the same, the classifier alone; ants and bees: 97.0 % (measured)",
    ),
}
