"""TrainConfig: every knob of a training run, declared once; common/cli.py derives the command line from it."""
import dataclasses

from common.cli import check_ranges, knob
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A complete run. Model folders make their recipes with dataclasses.replace.

    Raises:
      UserError: a value outside its range, or two knobs that contradict each other.
    """

    # Data
    data: str = knob("", "dataset root that holds train/ and val/", group="data")
    workers: int = knob(8, "loader processes of this machine, shared by its devices; capped at its cores", "-j", low=0, group="data")
    image_size: int = knob(299, "side of the square input, pixels", low=32, group="data")
    num_classes: int | None = knob(None, "number of classes; default: class folders of train/", "-p", low=2, group="data")
    batch_size: int = knob(256, "images per step of one machine, over all its devices", "-b", low=1, group="data")
    eval_batch_size: int = knob(64, "images per device and batch of evaluation", low=1, group="data")
    on_bad_image: str = knob("fail", "what to do with a file that does not decode", choices=("fail", "skip"), group="data")
    auto_augment: str = knob("none", "torchvision policy on top of crop and flip", choices=("none", "randaugment", "trivialaugment"), group="data")
    color_jitter: float = knob(0.0, "strength of brightness, contrast and saturation jitter", low=0, high=1, group="data")
    random_erasing: float = knob(0.0, "probability of erasing a rectangle", low=0, high=1, group="data")
    mixup: float = knob(0.0, "alpha of mixup; 0: off", low=0, group="data")
    cutmix: float = knob(0.0, "alpha of cutmix; 0: off (with mixup too: one of both at random per micro-batch)", low=0, group="data")

    # Model
    arch: str = knob("", "model name; only checked, each script trains its own model", "-a", group="model")
    dropout: float | None = knob(None, "dropout probability before the classifier; default: the model's own", low=0, high=1, group="model")
    transform_input: bool = knob(False, "convert ImageNet-normalised input to 0.5/0.5 first (for weights ported from TensorFlow)", group="model")
    pretrained: str = knob("", "start from the weights in this file", group="model")

    # Optimisation
    epochs: int = knob(240, "passes over the training set", low=1, group="optimisation")
    max_steps: int | None = knob(None, "stop after this many steps in all", low=1, group="optimisation")
    lr: float = knob(0.045, "peak learning rate", "--learning-rate", above=0, group="optimisation")
    lr_schedule: str = knob("cosine-epoch", "how the learning rate falls", group="optimisation")
    warm_up_epochs: int = knob(0, "epochs of rising learning rate", low=0, group="optimisation")
    momentum: float = knob(0.9, "momentum of SGD", low=0, high=1, group="optimisation")
    weight_decay: float = knob(1e-4, "weight decay", "--wd", low=0, group="optimisation")
    decay_norm: bool = knob(True, "apply weight decay to batch-norm parameters too", group="optimisation")
    label_smoothing: float = knob(0.1, "share of the target given to all classes", low=0, high=1, group="optimisation")
    smoothing_off: str = knob("all", "spread the smoothed share over all classes or over the others only", choices=("all", "others"), group="optimisation")
    accumulate: int = knob(1, "micro-batches per device and step", low=1, group="optimisation")
    ema: float = knob(0.0, "decay of the exponential moving average of the weights; 0: off", low=0, high=1, group="optimisation")
    seed: int = knob(0, "order, augmentation, dropout and initial weights are functions of it", low=0, group="optimisation")

    # Device
    device: str = knob("auto", "where to run; auto: npu, then cuda, then cpu", choices=("auto", "npu", "cuda", "cpu"), group="device")
    device_id: int = knob(0, "index of the device of a single-process run", low=0, group="device")
    npu: int | None = knob(None, "same as --device npu --device-id N", "--npu", low=0, group="device")
    amp: bool = knob(False, "mixed precision (on cpu only together with --amp-dtype bf16)", group="device")
    amp_dtype: str = knob("auto", "type of mixed precision; auto: fp16 on npu and cuda, off on cpu", choices=("auto", "fp16", "bf16"), group="device")
    loss_scale: str = knob("dynamic", "fp16 loss scale: a number or dynamic", group="device")
    memory_format: str = knob("auto", "layout of activations; auto: channels_last on cpu and cuda, nchw on npu", choices=("auto", "nchw", "channels_last"), group="device")
    compile: bool = knob(False, "torch.compile the network (minutes before the first step)", group="device")
    threads: int | None = knob(None, "CPU threads of each process; default: the cores shared by this machine's processes", low=1, group="device")
    reduce: str = knob("fast", "sum of gradients: fast (all-reduce) or exact (index order: same bits for any number of ranks)", choices=("fast", "exact"), group="device")

    # Run
    output_dir: str = knob("", "folder of this run; default: a new numbered folder under ./output", group="run")
    resume: str = knob("", "continue from this checkpoint; auto: from the newest one that verifies", group="run")
    save_every: int = knob(0, "steps between checkpoints within an epoch; 0: only at its end", low=0, group="run")
    print_freq: int = knob(100, "steps between progress lines", low=1, group="run")
    warm_up_steps: int = knob(10, "first steps that the throughput leaves out", low=0, group="run")
    evaluate: bool = knob(False, "evaluate --resume or --pretrained and stop", "-e", group="run")

    def __post_init__(self):
        check_ranges(self)
        if self.loss_scale != "dynamic":
            try:
                positive = float(self.loss_scale) > 0
            except ValueError:
                positive = False
            if not positive:
                raise UserError(f"--loss-scale: {self.loss_scale}, must be a positive number or dynamic")
        if self.warm_up_epochs >= self.epochs and self.warm_up_epochs:
            raise UserError(f"--warm-up-epochs: {self.warm_up_epochs}, must be fewer than --epochs {self.epochs}")
        if self.npu is not None and self.device not in ("auto", "npu"):
            raise UserError(f"--npu: contradicts --device {self.device}; give one of them")
        if self.evaluate and not (self.resume or self.pretrained):
            raise UserError("--evaluate: needs --resume FILE or --pretrained FILE")

    @property
    def device_kind(self):
        """--device, or npu where --npu N was given."""
        return "npu" if self.npu is not None else self.device

    @property
    def device_index(self):
        """Index of the device of a single-process run."""
        return self.npu if self.npu is not None else self.device_id
