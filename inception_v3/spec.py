"""What is true of Inception v3 alone: sizes, normalization, how to build it. Importing this does not import torch."""

from collections.abc import Mapping
from typing import Any

from common.spec import IMAGENET, ModelSpec
from inception_v3 import weights


def _build(**options: Any) -> Any:
    from inception_v3.model import InceptionV3

    return InceptionV3(**options)


def _infer_options(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Build options that a file without any gives away.

    TensorFlow's Inception v3 has no batch-norm scale, so weights ported from it have scales of exactly 1 beside
    trained statistics; they expect 0.5/0.5 normalization.
    """
    scales = [tensor for key, tensor in state_dict.items() if key.endswith(".bn.weight")]
    variance = state_dict.get("Conv2d_1a_3x3.bn.running_var")
    ported = bool(scales) and all(bool((scale == 1).all()) for scale in scales)
    trained = variance is not None and not bool((variance == 1).all())
    return {"aux": any(key.startswith("AuxLogits.") for key in state_dict), "transform_input": ported and trained}


SPEC = ModelSpec(
    name="inception_v3",
    builder=_build,
    build_options=dict(num_classes=1000, aux=True, transform_input=False, dropout=0.5, pool_padding="torch"),
    mean=IMAGENET[0],
    std=IMAGENET[1],
    label_offset=1,
    aux_weight=0.4,
    key_maps={"state_dict": weights.from_torch, "mindspore": weights.from_mindspore, "keras": weights.from_keras},
    export_maps={"mindspore": weights.to_mindspore, "keras": weights.to_keras},
    format_options={
        "state_dict": {"pool_padding": "torch"},
        "mindspore": {"pool_padding": "same", "transform_input": False},
        "keras": {"pool_padding": "same", "transform_input": True, "aux": False},
    },
    folds={"transform_input": weights.fold_transform},
    classifiers=("fc", "AuxLogits.fc"),
    training_modules=("AuxLogits",),
    infer_options=_infer_options,
    weight_urls=("https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",),
    weight_names=("torchvision",),
    keras_name="InceptionV3",
    timm_name="inception_v3",
)
