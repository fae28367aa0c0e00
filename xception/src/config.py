"""What is true of Xception alone: its spec, read by every stage, and the seed's training recipes.

ASCEND and GPU are the two columns of parameters of the MindSpore package, under its names on the command line
(`--epoch_size`, `--lr_max` ...). Reported with either, on 8 devices: top-1 79.8 after 250 epochs.
"""

import dataclasses

from common import cli
from common.config import TrainConfig
from common.errors import UserError
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
    format_options={
        "state_dict": {"pool_padding": "torch", "bn_eps": 1e-5},
        "mindspore": _MINDSPORE,
        "keras": {"pool_padding": "same", "bn_eps": 1e-3},
    },
    weight_urls=(
        "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-cadene/xception-43020ad28.pth",
        "http://data.lip6.fr/cadene/pretrainedmodels/xception-43020ad28.pth",
    ),
)

DEVICES = {"Ascend": "npu", "GPU": "cuda", "CPU": "cpu"}  # words of --device_target -> ours


def device_option(config_class, **changes):
    """--device_target, which takes the seed's words and ours."""
    return cli.renamed(
        config_class,
        "device",
        "--device-target",
        choices=("auto", *DEVICES, *DEVICES.values()),
        help="where to run; auto: npu, then cuda, then cpu",
        **changes,
    )


def _renamed(field, name, **changes):
    return cli.renamed(TrainConfig, field, name, **changes)


@dataclasses.dataclass(frozen=True)
class XceptionConfig(TrainConfig):
    """The shared trainer's options under the seed's names, and the seed's own.

    Raises:
      UserError: a value outside its range.
    """

    data: str = _renamed("data", "--dataset-path", help="training set: the folder that holds one folder per class")
    eval_path: str = cli.option("", "validation set, evaluated after every epoch (default: none)", group="data")
    device: str = device_option(TrainConfig)
    recipe: str = cli.option(
        "auto",
        "defaults to use; auto: Ascend's on an npu, GPU's elsewhere",
        choices=("auto", "Ascend", "GPU"),
        group="device",
    )
    is_distributed: bool = cli.option(False, "said by the seed's scripts; the launcher's ranks decide", group="device")
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

    def __post_init__(self):
        super().__post_init__()
        if self.finish_epoch >= self.epochs:
            raise UserError(f"--finish-epoch: {self.finish_epoch}, must be fewer than --epoch-size {self.epochs}")

    def check_warm_up(self):
        """The seed's recipe warms up for one epoch; a run of that one epoch is legal, as it was."""
        if self.warm_up_epochs > self.epochs:
            raise UserError(f"--warmup-epochs: {self.warm_up_epochs}, more than --epoch-size {self.epochs}")

    @property
    def device_kind(self):
        """The device in our words."""
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
    # What the package fixes in its programs: data, loss, optimizer, precision, seed.
    color_jitter=0.4,
    smoothing_targets="others",
    decay_norm=False,
    amp=True,
    seed=1,
)
GPU = dataclasses.replace(ASCEND, recipe="GPU", batch_size=64, save_checkpoint_path="./gpu-ckpt", lr_schedule="linear")
