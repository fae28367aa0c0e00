"""ModelSpec: what the shared packages need to know about a network. Importing this does not import torch.

Training, evaluation, preprocessing, export and the AIPP file read the same object, so they agree on sizes, crops,
normalization and names.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import UserError

if typing.TYPE_CHECKING:
    import torch

StateDict = Mapping[str, "torch.Tensor"]
BuildOptions = Mapping[str, Any]
Triple = tuple[float, float, float]
Normalization = tuple[Triple, Triple]  # mean and standard deviation of RGB values in [0, 1]

IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_RANGE: Normalization = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # values in [-1, 1]


def _never_same(option: str, image_size: int) -> bool:
    return False


def _no_options(state_dict: StateDict) -> BuildOptions:
    return {}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One network: how to build it, its input and its output. One field for each fact that a stage reads.

    Attributes:
      name: folder and log name; the `arch` of a checkpoint.
      builder: called with keyword arguments, returns the nn.Module; imports torch when it is called.
      build_options: keyword arguments of `builder` with their defaults; stored in every checkpoint.
      input_size: published side of the square input, pixels.
      min_size: smallest side that the network accepts, pixels.
      eval_resize: short side after the evaluation resize at `input_size`, pixels.
      crop_rounding: rounding of the offset of the center crop where the border is odd: "round" (half to even, as in
        torchvision) or "floor".
      mean, std: normalization of RGB values in [0, 1].
      num_classes: classes of the public weights, without a background class.
      label_offset: background columns that precede class 0 in a checkpoint with `num_classes + label_offset` outputs.
      aux_weight: weight of the auxiliary head's loss; 0 for a network without one.
      onnx_input, onnx_output: names in exported files.
      key_maps: file format -> function from its state dict to ours; "state_dict" is every file of torch tensors that is
        not a checkpoint of this repository (torchvision, timm, Cadene).
      export_maps: file format -> inverse of the function in `key_maps`; none where the names are ours.
      format_options: file format -> build options of the network whose weights such files hold.
      folds: build option -> function (state dict, its value, another value) that returns weights with which the network
        built with the other value gives the same logits in evaluation mode.
      same_at: whether networks that differ in one build option are the same function for images of a size.
      classifiers: names of the linear layers with one row per class, the main one first.
      training_modules: submodules for training only (an auxiliary head). A training that starts from weights without
        them initializes them.
      infer_options: called with a state dict in our names, returns the build options that its keys and shapes imply,
        for example {"aux": True}; not the class count, which is read from `classifiers`.
      weight_urls: addresses of the public weights, tried in order; the file name carries its hash, as in torch.hub.
      weight_names: words that `train.py --pretrained` takes for them: the packages that publish them.
      keras_name, timm_name: the network in keras.applications and in timm; empty: none.
    """

    name: str
    builder: Callable[..., "torch.nn.Module"]
    build_options: BuildOptions
    input_size: int = 299
    min_size: int = 75
    eval_resize: int = 342
    crop_rounding: str = "round"
    mean: Triple = HALF_RANGE[0]
    std: Triple = HALF_RANGE[1]
    num_classes: int = 1000
    label_offset: int = 0
    aux_weight: float = 0.0
    onnx_input: str = "image"
    onnx_output: str = "class"
    key_maps: Mapping[str, Callable[[StateDict], StateDict]] = dataclasses.field(default_factory=dict)
    export_maps: Mapping[str, Callable[[StateDict], StateDict]] = dataclasses.field(default_factory=dict)
    format_options: Mapping[str, BuildOptions] = dataclasses.field(default_factory=dict)
    folds: Mapping[str, Callable[[StateDict, Any, Any], StateDict]] = dataclasses.field(default_factory=dict)
    same_at: Callable[[str, int], bool] = _never_same
    classifiers: tuple[str, ...] = ("fc",)
    training_modules: tuple[str, ...] = ()
    infer_options: Callable[[StateDict], BuildOptions] = _no_options
    weight_urls: tuple[str, ...] = ()
    weight_names: tuple[str, ...] = ()
    keras_name: str = ""
    timm_name: str = ""

    def build(self, **options: Any) -> "torch.nn.Module":
        """Build the network with initialized weights.

        Raises:
          TypeError: the network has no such option.
        """
        unknown = sorted(set(options) - set(self.build_options))
        if unknown:
            raise TypeError(f"{self.name}.build() takes {sorted(self.build_options)}, not {unknown}")
        return self.builder(**{**self.build_options, **options})

    def resize_for(self, image_size: int) -> int:
        """Short side of the evaluation resize for an input of `image_size` pixels."""
        return round(self.eval_resize * image_size / self.input_size)

    def background_columns(self, num_outputs: int) -> int:
        """How many of `num_outputs` columns precede class 0."""
        return self.label_offset if num_outputs == self.num_classes + self.label_offset else 0

    def check_image_size(self, image_size: int, flag: str = "--image-size") -> None:
        """Raise UserError when the network cannot take square inputs of `image_size` pixels."""
        if image_size < self.min_size:
            raise UserError(f"{flag}: {image_size} pixels, {self.name} takes {self.min_size} and more")
