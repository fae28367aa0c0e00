"""ModelSpec of Xception, its options under the names of the MindSpore package, and its training recipes.

    sh xception/scripts/run_distribute_train.sh RANK_TABLE_FILE /dataset/train
    python xception/train.py --device_target GPU --dataset_path /dataset/train

ASCEND and GPU are the two columns of parameters of the MindSpore package. Reported with either, on 8 devices: top-1
79.8 after 250 epochs.

`modern` is common.config.MODERN, which names source and published gain of each ingredient. The deeper Xception65 went
from 79.56 to 83.19 top-1 with RandAugment, EMA, warm-up and a crop of 0.94 (timm's xception65.tf_in1k and .ra3_in1k);
this network reached 79.01 with mindcv's AutoAugment, random erasing 0.25, cosine and 5 warm-up epochs.
"""

import dataclasses
from typing import Any

from common import cli
from common.config import FINETUNE, MODERN, PROBE, Recipe, TrainConfig
from common.data.labels import FROM_0
from common.errors import UserError
from common.spec import ModelSpec
from common.weights import folding
from xception.src import weights


def _build(**options: Any) -> Any:
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
    format_options={
        "state_dict": {"pool_padding": "torch", "bn_eps": 1e-5},
        "mindspore": _MINDSPORE,
        "keras": {"pool_padding": "same", "bn_eps": 1e-3},
    },
    folds={"bn_eps": folding.fold_eps},
    same_at=weights.same_at,
    weight_urls=(
        "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-cadene/xception-43020ad28.pth",
        "http://data.lip6.fr/cadene/pretrainedmodels/xception-43020ad28.pth",
    ),
    weight_names=("timm", "cadene"),
    keras_name="Xception",
    timm_name="legacy_xception",
)

DEVICES = {"Ascend": "npu", "GPU": "cuda", "CPU": "cpu"}  # --device_target of MindSpore -> torch's name


def device_option(config_class: type[Any]) -> Any:
    """--device_target, which takes MindSpore's names and torch's."""
    choices, help = ("auto", *DEVICES, *DEVICES.values()), "where to run; auto: npu, then cuda, then cpu"
    return cli.renamed(config_class, "device", "--device-target", choices=choices, help=help)


def _renamed(field: str, name: str, **changes: Any) -> Any:
    return cli.renamed(TrainConfig, field, name, **changes)


@dataclasses.dataclass(frozen=True)
class XceptionConfig(TrainConfig):
    """TrainConfig under the option names of the MindSpore package, and the package's own options: one field each.

    Raises:
      UserError: a value outside its range.
    """

    NOT_COMPARED_ON_RESUME = TrainConfig.NOT_COMPARED_ON_RESUME | {
        "eval_path", "is_distributed", "is_fp32", "finish_epoch", "use_label_smooth",
    }  # fmt: skip

    data: str = _renamed(
        "data",
        "--dataset-path",
        help="training set: the folder that holds one folder per class",
        required="the folder that holds one folder of images per class",
    )
    eval_path: str = cli.option("", "validation set, evaluated after every epoch (default: none)", group="data")
    device: str = device_option(TrainConfig)
    recipe: str = _renamed("recipe", "--recipe", default="auto", help="defaults; auto: Ascend on an npu, else GPU")
    is_distributed: bool = cli.option(False, "accepted; the launcher decides the number of ranks", group="device")
    is_fp32: bool = cli.option(False, "no mixed precision", group="device")
    batch_size: int = _renamed("batch_size", "--batch-size", help="images per step of one device")
    epochs: int = _renamed("epochs", "--epoch-size")
    warm_up_epochs: int = _renamed("warm_up_epochs", "--warmup-epochs")
    finish_epoch: int = cli.option(0, "epochs that --resume or --pretrained has behind it", low=0, group="optimization")
    lr_schedule: str = _renamed("lr_schedule", "--lr-decay-mode", help="linear, steps, poly or cosine")
    lr_init: float = cli.option(4e-5, "learning rate at the first step", low=0, group="optimization")
    lr: float = _renamed("lr", "--lr-max")
    lr_end: float = cli.option(4e-5, "learning rate after the last step", low=0, group="optimization")
    use_label_smooth: bool = cli.option(True, "smooth the labels in training", group="optimization")
    label_smoothing: float = _renamed("label_smoothing", "--label-smooth-factor")
    save_checkpoint: bool = cli.option(True, "keep Xception-rank0-EPOCH_STEP.ckpt files", group="run")
    save_checkpoint_epochs: int = cli.option(1, "epochs between them", low=1, group="run")
    keep_checkpoint_max: int = cli.option(5, "how many of a run stay", low=1, group="run")
    save_checkpoint_path: str = cli.option("./", "folder for them; Ascend's recipe adds ckpt_0/", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_numbers != FROM_0:
            raise UserError(
                f"--label-numbers: {self.label_numbers}, but --eval-path holds class folders, no label file"
            )
        if self.finish_epoch >= self.epochs:
            raise UserError(f"--finish-epoch: {self.finish_epoch}, must be fewer than --epoch-size {self.epochs}")

    def check_warm_up(self) -> None:
        """A run that only warms up is allowed, as in the MindSpore package, whose recipes warm up for one epoch."""
        if self.warm_up_epochs > self.epochs:
            raise UserError(f"--warmup-epochs: {self.warm_up_epochs}, more than --epoch-size {self.epochs}")

    @property
    def device_kind(self) -> str:
        """Kind of device: "auto", "npu", "cuda" or "cpu"."""
        return DEVICES.get(super().device_kind, super().device_kind)


ASCEND = XceptionConfig(
    recipe="Ascend",
    num_classes=1000,
    batch_size=128,
    loss_scale="1024",
    momentum=0.9,
    weight_decay=1e-4,
    epochs=250,
    save_checkpoint=True,
    save_checkpoint_epochs=1,
    keep_checkpoint_max=5,
    save_checkpoint_path="./",
    warm_up_epochs=1,
    lr_schedule="liner",
    use_label_smooth=True,
    finish_epoch=0,
    label_smoothing=0.1,
    lr_init=4e-5,
    lr=0.4,
    lr_end=4e-5,
    # Constants of the package's programs.
    color_jitter=0.4,
    smoothing_targets="others",
    decay_norm=False,
    amp=True,
    seed=1,
)
GPU = dataclasses.replace(ASCEND, recipe="GPU", batch_size=64, save_checkpoint_path="./gpu-ckpt", lr_schedule="linear")

# Without the package's constants. The mode cosine is MindSpore's: a cosine times a linear decay.
_TUNING: dict[str, Any] = dict(
    num_classes=None, amp=False, lr_schedule="cosine", smoothing_targets="all", color_jitter=0.0, decay_norm=True
)
_FINETUNE = dataclasses.replace(GPU, **_TUNING, **FINETUNE, recipe="finetune", lr_init=0.0, freeze="block12")
_PROBE = dataclasses.replace(GPU, **_TUNING, **PROBE, recipe="probe")
_MODERN = dataclasses.replace(GPU, **{**_TUNING, **MODERN}, recipe="modern", batch_size=128, loss_scale="dynamic")

RECIPES = {
    "GPU": Recipe(GPU, "8 GPUs", "top-1 79.8 %, top-5 95 %, 282 ms a step (reported)", devices=8),
    "Ascend": Recipe(ASCEND, "8 NPUs", "top-1 79.8 %, top-5 95 %, 479 ms a step (reported)", devices=8),
    "modern": Recipe(
        _MODERN,
        "8 devices",
        "gained 4.7 points of top-1 with ResNet-50 (reported), not measured here",
        devices=8,
    ),
    "finetune": Recipe(_FINETUNE, "1 device", "some hundred photographs, --pretrained"),
    "probe": Recipe(_PROBE, "1 device", "the same, the classifier alone, in a minute or two"),
}
