"""TrainConfig: every option of a training run, declared once; common/cli.py derives the command line from it."""

import dataclasses
import functools
import re
import typing
from typing import Any

from common.cli import DEVICES, check_ranges, flag_of, option
from common.data.labels import numbers_option
from common.errors import UserError

_data, _model, _optim, _device, _run = (
    functools.partial(option, group=group) for group in ("data", "model", "optimization", "device", "run")
)

AUTO = 0  # --batch-size auto


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All options of a run, one field each. The recipes of a model are instances of it (see Recipe).

    Raises:
      UserError: a value outside its range, or two options that contradict each other.
    """

    # Options that a resumed run takes from its checkpoint, that are checked against it, or that change no number.
    NOT_COMPARED_ON_RESUME: typing.ClassVar[frozenset[str]] = frozenset(
        "data workers image_size eval_size num_classes batch_size eval_batch_size exclude arch dropout transform_input "
        "pool_padding pretrained freeze freeze_norm cache_features head_lr_scale head_init use_ema accumulate repeated_aug seed device_id npu "
        "memory_format threads lr_find".split()
    )

    # Options that have no effect with --cache-features.
    NO_EFFECT_ON_FEATURES: typing.ClassVar[tuple[str, ...]] = tuple(
        "eval_size train_crop min_crop auto_augment color_jitter random_erasing repeated_aug mixup cutmix head_init "
        "accumulate lr_find".split()
    )

    # fmt: off
    recipe: str = _run("default", "named set of defaults; the recipes are listed above")

    # Data
    data: str = _data("", "dataset root that holds train/ and val/", required="the folder that holds train/ and val/")
    workers: int = _data(8, "loader processes of this machine, at most its cores", "-j", low=0)
    image_size: int = _data(299, "side of the square input, pixels", low=32)
    eval_size: int | None = _data(None, "the same in validation and for what the checkpoint is used for; default: --image-size", low=32)
    num_classes: int | None = _data(None, "number of classes; default: class folders of train/", "-p", low=2)
    batch_size: int = _data(256, "images per step of one machine, over all its devices", "-b", low=1, auto=AUTO)
    eval_batch_size: int = _data(64, "images per device and batch of evaluation", low=1)
    on_bad_image: str = _data("fail", "what to do with a file that does not decode", choices=("fail", "skip"))
    label_numbers: str = numbers_option("data")
    exclude: str = _data("", "list of images to leave out, one path per line, as tools/check_data.py writes it")
    train_crop: str = _data("random", "random: resized crop of --min-crop; center: as in evaluation", choices=("random", "center"))
    min_crop: float = _data(0.08, "smallest share of an image's area that a training crop keeps", above=0, high=1)
    auto_augment: str = _data("none", "torchvision policy on top of crop and flip", choices=("none", "randaugment", "trivialaugment"))
    color_jitter: float = _data(0.0, "strength of brightness, contrast and saturation jitter", low=0, high=1)
    random_erasing: float = _data(0.0, "probability of erasing a rectangle", low=0, high=1)
    repeated_aug: int = _data(1, "times that each image of a step occurs, augmented anew; an epoch takes an n-th of the images", low=1)
    decoder: str = _data("auto", "of training images; pil: as in evaluation; fast: the same pixels of JPEG files, other resize; auto: fast where it works", choices=("auto", "fast", "pil"))
    mixup: float = _data(0.0, "alpha of mixup; 0: off", low=0)
    cutmix: float = _data(0.0, "alpha of cutmix; 0: off; with mixup too, one of both at random", low=0)

    # Model
    arch: str = _model("", "model name; only checked, each script trains its own model", "-a")
    dropout: float | None = _model(None, "dropout probability before the classifier; default: the model's own", low=0, high=1)
    transform_input: bool | None = _model(None, "convert ImageNet-normalized input to 0.5/0.5; default: as --pretrained needs")
    pool_padding: str | None = _model(
        None, "padding of the pools, which decides where the weights can leave to: torch for timm, same for Keras and MindSpore; "
        "default: as --pretrained needs, else the model's own", choices=("torch", "same")
    )
    pretrained: str = _model("", "start from the weights in this file")
    freeze: str = _model("none", "weights of --pretrained to keep: none, head (all but the classifier), or a block: all before it")
    freeze_norm: bool = _model(False, "keep the running statistics of all batch norms, not only those of frozen blocks")
    cache_features: bool = _model(
        False, "with --freeze head: compute the features of each image and its mirror image once; a step takes them all"
    )
    head_init: str = _model(
        "weights", "classifier to start with: that of --pretrained, or probe: trained alone first, as by the recipe probe", choices=("weights", "probe")
    )
    use_ema: bool | None = _model(None, "take the averaged weights of --pretrained (or --evaluate); default: where it has them")

    # Optimization
    epochs: int = _optim(240, "passes over the training set", low=1)
    max_steps: int | None = _optim(None, "stop after this many steps in all", low=1)
    lr: float = _optim(0.045, "peak learning rate", "--learning-rate", above=0)
    lr_find: bool = _optim(False, "find --lr before the first step, by a range test of 100 steps")
    head_lr_scale: float = _optim(1.0, "learning rate of the classifier, as a multiple of --lr at every step", above=0)
    lr_schedule: str = _optim("cosine-epoch", "learning-rate schedule")
    warm_up_epochs: int = _optim(0, "epochs of rising learning rate", low=0)
    optimizer: str = _optim("sgd", "update rule; every published recipe is SGD with momentum", choices=("sgd", "rmsprop", "adamw"))
    momentum: float = _optim(0.9, "momentum of SGD and RMSprop, first beta of AdamW", low=0, high=1)
    weight_decay: float = _optim(1e-4, "weight decay", "--wd", low=0)
    decay_norm: bool = _optim(True, "apply weight decay to batch-norm parameters too")
    label_smoothing: float = _optim(0.1, "label smoothing: share of the target spread over classes", low=0, high=1)
    smoothing_targets: str = _optim("all", "classes that share it: all, or all but the label", "--smoothing-off", choices=("all", "others"))
    bce: bool = _optim(False, "train with binary cross entropy, mean over classes, instead of cross entropy")
    bce_target_thresh: float | None = _optim(None, "of --bce: targets above it become 1, the others 0", low=0, high=1)
    accumulate: int = _optim(1, "micro-batches per device and step", low=1)
    clip_grad: float = _optim(0.0, "largest norm of a step's gradient; 0: off", low=0)
    ema: float = _optim(0.0, "decay of the exponential moving average of the weights; 0: off", low=0, high=1)
    seed: int = _optim(0, "seed of data order, augmentation, dropout and initial weights", low=0)

    # Device
    device: str = _device("auto", "where to run; auto: npu, then cuda, then cpu", choices=DEVICES)
    device_id: int = _device(0, "index of the device of a single-process run", low=0)
    npu: int | None = _device(None, "same as --device npu --device-id N", "--npu", low=0)
    amp: bool = _device(False, "mixed precision (on cpu only together with --amp-dtype bf16)")
    amp_dtype: str = _device("auto", "its type; auto: fp16 on npu and cuda, off on cpu", choices=("auto", "fp16", "bf16"))
    loss_scale: str = _device("dynamic", "fp16 loss scale: a number or dynamic")
    amp_backend: str = _device("native", "backend of --amp: PyTorch's autocast, or apex where it is installed", choices=("native", "apex"))
    opt_level: str | None = _device(None, "of apex: O1 casts in functions, O2 (its default here) keeps fp16 weights", choices=("O1", "O2"))
    combine_grad: bool = _device(False, "of Ascend's apex: keep all gradients in one tensor")
    full_fp32: bool = _device(False, "compute float32 in full: no HF32 on npu, no TF32 on cuda; slower, for comparisons")
    memory_format: str = _device("auto", "layout; auto: nchw on npu, else channels_last", choices=("auto", "nchw", "channels_last"))
    compile: bool = _device(False, "torch.compile the network (minutes before the first step)")
    threads: int | None = _device(None, "CPU threads of each process; default: OMP_NUM_THREADS, else its share of the cores", low=1)
    reduce: str = _device("fast", "gradient sum: fast, or exact (same bits for any number of ranks)", choices=("fast", "exact"))

    # Run
    output_dir: str = _run("", "folder of this run; default: a new numbered folder under ./output")
    run_name: str = _run("", "folder below ./output; default: MODEL_train or the launcher's name")
    resume: str = _run("", "continue from this checkpoint; auto: from the newest one that verifies")
    save_every: str = _run("0", "steps between checkpoints within an epoch, or minutes as 10m; 0: only at its end")
    keep_last: int = _run(0, "further checkpoints to keep, the latest ones, as checkpoint-STEP.pth.tar", low=0)
    keep_best: int = _run(0, "further checkpoints to keep, those of the highest top-1, as model_best-EPOCH-TOP1.pth.tar", low=0)
    on_save_error: str = _run("continue", "when a checkpoint cannot be written: report it and continue, or stop", choices=("continue", "stop"))
    hang_timeout: float = _run(1800, "seconds without progress after which a hanging rank or loader ends the run; 0: never", low=0)
    machines: int | None = _run(None, "machines that --batch-size and --accumulate count; default: those that take part", low=1)
    rendezvous_timeout: int = _run(600, "seconds to wait for all ranks of the run", low=1)
    print_freq: int = _run(100, "steps between progress lines", low=1)
    throughput_skip_steps: int = _run(10, "first steps that the throughput leaves out", "--warm-up-steps", low=0)
    tensorboard: bool = _run(False, "write TensorBoard event files to the run folder, beside metrics.jsonl")
    evaluate: bool = _run(False, "evaluate --resume or --pretrained and stop", "-e")
    predictions: str = _run("", "with --evaluate: file to write the five best classes of each image to, .csv or .json")
    # fmt: on

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.loss_scale != "dynamic":
            try:
                positive = float(self.loss_scale) > 0
            except ValueError:
                positive = False
            if not positive:
                raise UserError(f"--loss-scale: {self.loss_scale}, must be a positive number or dynamic")
        self.check_warm_up()
        self.check_apex()
        self.save_interval  # noqa: B018  raises for a malformed value
        if self.npu is not None and self.device not in ("auto", "npu"):
            raise UserError(f"--npu: contradicts --device {self.device}; give one of them")
        if self.optimizer == "adamw" and self.momentum == 1:
            raise UserError("--momentum: 1.0, must be below 1 with --optimizer adamw")
        self.check_cached_features()
        if self.bce_target_thresh is not None and not self.bce:
            raise UserError(f"--bce-target-thresh: {self.bce_target_thresh}, needs --bce")
        if self.train_crop == "center" and self.min_crop != TrainConfig.__dataclass_fields__["min_crop"].default:
            raise UserError(f"--min-crop: {self.min_crop}, has no effect with --train-crop center; leave it out")
        if self.use_ema is not None and not (self.pretrained or self.resume):
            raise UserError(f"{'--use-ema' if self.use_ema else '--no-use-ema'}: needs --pretrained FILE")
        if self.evaluate and not (self.resume or self.pretrained):
            raise UserError("--evaluate: needs --resume FILE or --pretrained FILE")
        if self.predictions and not self.evaluate:
            raise UserError("--predictions: is of an evaluation; add --evaluate, or take eval.py")

    def check_warm_up(self) -> None:
        """Raise UserError for a run that ends before its warm-up does."""
        if self.warm_up_epochs >= self.epochs and self.warm_up_epochs:
            raise UserError(
                f"--warm-up-epochs: {self.warm_up_epochs}, must be fewer than --epochs {self.epochs}; a recipe may set "
                "it, --warm-up-epochs 0 leaves it out"
            )

    def check_cached_features(self) -> None:
        """Raise UserError for options that have no effect on features that are computed once."""
        if not self.cache_features:
            return
        if self.freeze != "head":
            raise UserError(f"--cache-features: needs --freeze head, not {self.freeze}")
        for name in self.NO_EFFECT_ON_FEATURES:
            field, value = type(self).__dataclass_fields__[name], getattr(self, name)
            if value != TrainConfig.__dataclass_fields__[name].default:
                raise UserError(f"{flag_of(field)}: {value}, has no effect with --cache-features; leave it out")

    def check_apex(self) -> None:
        """Raise UserError for apex's options without apex, and for options that apex does not support."""
        if self.amp_backend == "native":
            if self.opt_level:
                raise UserError(f"--opt-level: {self.opt_level} is of apex; add --amp-backend apex, or leave it out")
            if self.combine_grad:
                raise UserError("--combine-grad: is of apex; add --amp-backend apex, or leave it out")
        elif not self.amp:
            raise UserError("--amp-backend: apex, needs --amp")
        elif self.amp_dtype == "bf16":
            raise UserError("--amp-dtype: bf16, but apex supports fp16 only; use --amp-backend native")
        elif self.reduce == "exact" or self.ema:
            flag = "--ema" if self.ema else "--reduce exact"
            raise UserError(f"{flag}: works with float32 weights, apex may replace them; use --amp-backend native")

    @property
    def save_interval(self) -> tuple[int, float]:
        """(steps, seconds) of --save-every; the one that was not given is 0.

        Raises:
          UserError: neither a number of steps nor of minutes.
        """
        if re.fullmatch(r"\d+", self.save_every):
            return int(self.save_every), 0.0
        if re.fullmatch(r"\d+(\.\d+)?m", self.save_every):
            return 0, 60 * float(self.save_every[:-1])
        raise UserError(f"--save-every: {self.save_every}, must be a number of steps (500) or of minutes (10m)")

    @property
    def evaluation_size(self) -> int:
        """Side of the input in validation, pixels; the "image_size" of the checkpoints."""
        return self.eval_size or self.image_size

    @property
    def device_kind(self) -> str:
        """--device, or npu where --npu N was given."""
        return "npu" if self.npu is not None else self.device

    @property
    def device_index(self) -> int:
        """Index of the device of a single-process run."""
        return self.npu if self.npu is not None else self.device_id


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named set of defaults of a training program: `--recipe NAME`.

    Attributes:
      config: the options; those on the command line override it.
      hardware: devices that it is made for.
      expected: accuracy and speed, and whether they are reported or measured.
      devices: devices whose batches make up the step that `lr` is for, where --batch-size counts images of one device.
    """

    config: TrainConfig
    hardware: str = "any"
    expected: str = ""
    devices: int = 1

    @property
    def images_per_step(self) -> int:
        """Global batch size that the learning rate is for."""
        return self.devices * self.config.batch_size


# Options of the recipes `modern`: torchvision's for ResNet-50, with the top-1 that each step gained there, from 76.130 to
# 80.858 (https://pytorch.org/blog/how-to-train-state-of-the-art-models-using-torchvision-latest-primitives/). A model
# adds its batch size: `lr` is for steps of 1024 images. BCE instead of mixup's cross entropy (arXiv 2110.00476): --bce.
MODERN: dict[str, Any] = dict(
    lr=0.5,
    warm_up_epochs=5,  # with the learning rate and the cosine: +0.364
    auto_augment="trivialaugment",  # arXiv 2103.10158: +0.312
    epochs=600,  # of 90: +1.800
    random_erasing=0.1,  # arXiv 1708.04896: +0.190
    label_smoothing=0.1,  # arXiv 1512.00567, section 7: +0.318
    mixup=0.2,  # arXiv 1710.09412: +0.118
    cutmix=1.0,  # arXiv 1905.04899: +0.278
    weight_decay=2e-5,
    decay_norm=False,  # with the weight decay: +0.526
    image_size=235,  # 176 for 224 there; arXiv 1906.06423: +0.160
    eval_size=299,
    ema=0.9999,  # timm's usual decay at 1251 steps an epoch; theirs is 0.999966 a step: +0.254
    repeated_aug=4,  # arXiv 1902.05509: +0.184 with the published crop
    amp=True,
)
# Options of the recipes for a few hundred to some thousand photographs and weights of another training. A model adds
# the block to freeze below, and its README says what was measured.
FINETUNE: dict[str, Any] = dict(
    head_init="probe",
    batch_size=16,
    epochs=4,
    optimizer="adamw",
    lr=5e-5,
    head_lr_scale=10.0,
    warm_up_epochs=1,
    label_smoothing=0.1,
    weight_decay=0.01,
    freeze_norm=True,
    train_crop="center",
    print_freq=50,
)
PROBE: dict[str, Any] = dict(
    freeze="head",
    cache_features=True,
    epochs=200,
    optimizer="adamw",
    lr=0.01,
    warm_up_epochs=0,
    label_smoothing=0.1,
    weight_decay=0.01,
    dropout=0.5,
    print_freq=50,
)
