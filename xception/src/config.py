"""What is true of Xception alone: its spec, read by every stage, and the seed's two training recipes."""
from common.spec import ModelSpec
from xception.src import weights


def _build(**options):
    from xception.src.Xception import Xception

    return Xception(**options)


_MINDSPORE = {"pool_padding": "same", "bn_eps": 1e-5}

SPEC = ModelSpec(
    name="xception",
    builder=_build,
    build_options={"num_classes": 1000, "dropout": 0.5, **_MINDSPORE},
    input_size=299,
    min_size=71,
    eval_resize=320,
    crop_rounding="floor",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    num_classes=1000,
    key_maps={"state_dict": weights.from_torch, "mindspore": weights.from_mindspore, "keras": weights.from_keras},
    export_maps={"keras": weights.to_keras},
    origins={"state_dict": {"pool_padding": "torch", "bn_eps": 1e-5}, "mindspore": _MINDSPORE,
             "keras": {"pool_padding": "same", "bn_eps": 1e-3}},
    weight_urls=(
        "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-cadene/xception-43020ad28.pth",
        "http://data.lip6.fr/cadene/pretrainedmodels/xception-43020ad28.pth",
    ),
)
