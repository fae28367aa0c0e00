"""What is true of Inception v4 alone; every stage reads it from here."""

from typing import Any

from common.spec import ModelSpec
from inception_v4 import weights


def _build(**options: Any) -> Any:
    from inception_v4.model import InceptionV4

    return InceptionV4(**options)


SPEC = ModelSpec(
    name="inception_v4",
    builder=_build,
    build_options={"num_classes": 1000, "dropout": 0.2},
    input_size=299,
    min_size=75,
    eval_resize=342,
    crop_rounding="floor",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    num_classes=1000,
    label_offset=1,
    key_maps={"mindspore": weights.from_mindspore},
    export_maps={"mindspore": weights.to_mindspore},
    classifiers=("last_linear",),
    weight_urls=(
        "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-cadene/inceptionv4-8e4777a0.pth",
        "http://data.lip6.fr/cadene/pretrainedmodels/inceptionv4-8e4777a0.pth",
    ),
    weight_names=("timm", "cadene"),
    timm_name="inception_v4",
)
