"""ModelSpec: everything the shared parts need to know about one network.

Training, evaluation, preprocessing, export and the AIPP file all read the same object, so they cannot disagree about
sizes, crops, normalization or names. Importing this module does not import torch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from common.errors import UserError


def _no_options(state_dict):
    return {}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One network: how to build it and how its inputs and outputs look.

    Attributes:
      name: folder and log name, for example the `arch` of a checkpoint.
      builder: called with keyword arguments, returns the nn.Module; imports torch itself, when called.
      build_options: the keyword arguments `builder` takes, with their defaults; stored in every checkpoint.
      input_size: published side of the square input, pixels.
      min_size: smallest side the network accepts, pixels.
      eval_resize: short side after the evaluation resize at `input_size`, pixels.
      crop_rounding: how the offset of the center crop is rounded when the border is odd: "round" (half to even, as
        torchvision does) or "floor".
      mean, std: normalization of RGB values in [0, 1].
      num_classes: class count of the public weights, without a background class.
      label_offset: logits of a checkpoint with `num_classes + label_offset` outputs start with this many background
        columns.
      aux_weight: weight of the auxiliary head's loss; 0 for a network without one.
      onnx_input, onnx_output: names in exported files.
      key_maps: format name of a foreign checkpoint -> function that turns its state dict into ours; "state_dict" is
        every file of torch tensors that is not our own (torchvision, timm, Cadene).
      classifiers: names of the linear layers that have one row per class, the main one first.
      training_modules: submodules that only training uses (an auxiliary head); a file of weights without them can still
        start a training, which initializes them anew.
      infer_options: called with a state dict in our names that came without build options, returns those that its
        keys and shapes give away, for example {"aux": True}; the class count is read from `classifiers`.
      weight_urls: where the public weights lie, best first; the file name carries its hash, as torch.hub's do.
      origins: format name of a foreign checkpoint -> build options of the network whose weights such files hold.
      export_maps: format name -> inverse of the function in `key_maps`; none where the names are ours.
    """

    name: str
    builder: Callable[..., Any]
    build_options: Mapping[str, Any]
    input_size: int = 299
    min_size: int = 75
    eval_resize: int = 342
    crop_rounding: str = "round"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    num_classes: int = 1000
    label_offset: int = 0
    aux_weight: float = 0.0
    onnx_input: str = "image"
    onnx_output: str = "class"
    key_maps: Mapping[str, Callable[[dict], dict]] = dataclasses.field(default_factory=dict)
    classifiers: tuple[str, ...] = ("fc",)
    training_modules: tuple[str, ...] = ()
    infer_options: Callable[[dict], dict] = _no_options
    weight_urls: tuple[str, ...] = ()
    origins: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    export_maps: Mapping[str, Callable[[dict], dict]] = dataclasses.field(default_factory=dict)

    def build(self, **options):
        """Build the network (an nn.Module with initialized weights).

        Raises:
          TypeError: an option that means nothing for this network.
        """
        unknown = sorted(set(options) - set(self.build_options))
        if unknown:
            raise TypeError(f"{self.name}.build() takes {sorted(self.build_options)}, not {unknown}")
        return self.builder(**{**self.build_options, **options})

    def resize_for(self, image_size):
        """Short side of the evaluation resize, in pixels, that goes with an input of `image_size` pixels."""
        return round(self.eval_resize * image_size / self.input_size)

    def background_columns(self, num_outputs):
        """How many of `num_outputs` logits come before class 0: `label_offset` for the public size plus one, else 0."""
        return self.label_offset if num_outputs == self.num_classes + self.label_offset else 0

    def check_image_size(self, image_size, flag="--image-size"):
        """Raise UserError when the network cannot take square inputs of `image_size` pixels."""
        if image_size < self.min_size:
            raise UserError(f"{flag}: {image_size} pixels, {self.name} takes {self.min_size} and more")
