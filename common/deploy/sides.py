"""The two sides of tools/compare.py: a model, a reference network or a folder of result files, as logits per image.

Legend: N batch, H W pixel, C channel, K column of the logits.
"""

import dataclasses
import os
import pathlib
import typing
from collections.abc import Sequence

import numpy as np
from PIL import Image

from common.data.file_tree import nfc
from common.deploy import file_names, postprocess, reference_models
from common.errors import UserError
from common.evaluation import program
from common.evaluation.engines import EngineClassifier
from common.evaluation.input_pipeline import InputPipeline
from common.spec import ModelSpec
from common.weights.load import HUB_WEIGHTS

if typing.TYPE_CHECKING:
    import torch

    from common.evaluation.evaluate import Classifier
    from common.evaluation.torch_classifier import TorchClassifier


@dataclasses.dataclass(frozen=True)
class Side:
    """A or B.

    Attributes:
      name: as on the command line.
      num_outputs: columns of the logits; `background` of them precede class 0.
      classes: names of the classes, where the file has them.
      pipeline: how its input is made; None for results, which cannot be computed anew.
      spec: None for a reference network.
      order: columns of the model in the order in which they are compared; None: as they are.
    """

    name: str
    num_outputs: int
    background: int
    classes: Sequence[str] | None = None
    pipeline: InputPipeline | None = None
    spec: ModelSpec | None = None
    order: Sequence[int] | None = None

    def logits(self, pixels_NHWC: np.ndarray, paths: Sequence[str]) -> np.ndarray:
        """[N, K] of images that were cropped by `pipeline`."""
        rows_NK = self._rows(pixels_NHWC, paths)
        return rows_NK if self.order is None else rows_NK[:, self.order]

    def _rows(self, pixels_NHWC: np.ndarray, paths: Sequence[str]) -> np.ndarray:
        """logits() with the columns as the model gives them."""
        raise NotImplementedError

    def in_order(self, other: "Side") -> "Side":
        """This side with the columns in the order of the other's class names, where both have the same names."""
        own, wanted = ([nfc(name) for name in side.classes or ()] for side in (self, other))
        if own == wanted or sorted(own) != sorted(wanted) or len(own) + self.background != self.num_outputs:
            return self
        position = {name: i for i, name in enumerate(own)}
        columns = [self.background + position[name] for name in wanted]
        return dataclasses.replace(self, classes=other.classes, order=[*range(self.background), *columns])


@dataclasses.dataclass(frozen=True)
class ModelSide(Side):
    """A checkpoint, .onnx file, .om file or reference network."""

    classifier: "Classifier | None" = None

    def _rows(self, pixels_NHWC: np.ndarray, paths: Sequence[str]) -> np.ndarray:
        import torch

        assert self.classifier is not None
        return self.classifier(torch.from_numpy(pixels_NHWC))

    def with_pipeline(self, pipeline: InputPipeline) -> "ModelSide":
        """The same network with input that is made in another way."""
        assert self.pipeline is not None
        classifier = self.classifier
        if isinstance(classifier, EngineClassifier) and classifier.engine.dtype == np.uint8:
            inner = classifier

            def arranged(pixels_NHWC: "torch.Tensor") -> np.ndarray:
                return inner(np.stack([pipeline.arranged(np.asarray(pixels)) for pixels in pixels_NHWC]))

            return dataclasses.replace(self, pipeline=pipeline, classifier=arranged)
        if pipeline != dataclasses.replace(pipeline, **_input_fields(self.pipeline)):
            adjustable = typing.cast("TorchClassifier | EngineClassifier", classifier)
            classifier = adjustable.with_normalization(pipeline.normalize_into)
        return dataclasses.replace(self, pipeline=pipeline, classifier=classifier)


def _input_fields(pipeline: InputPipeline) -> dict[str, typing.Any]:
    return {name: getattr(pipeline, name) for name in ("colors", "mean", "std", "layout")}


@dataclasses.dataclass(frozen=True)
class ResultSide(Side):
    """A folder of result files, found by the names of the images."""

    results: dict[str, str] = dataclasses.field(default_factory=dict)

    def _rows(self, pixels_NHWC: np.ndarray, paths: Sequence[str]) -> np.ndarray:
        rows = []
        for path in paths:
            result = self.results.get(nfc(file_names.stem(os.path.basename(path))))
            if result is None:
                raise UserError(f"{self.name}: has no result for {path}; run the inference again on all images")
            row = postprocess.read_row(result, {self.num_outputs})
            rows.append(row / 1e6 if row.dtype == np.int64 else row)
        return np.stack(rows).astype(np.float32)


def open_side(
    argument: str,
    spec: ModelSpec | None,
    other: ModelSpec | None,
    options: program.EvalConfig,
    num_classes: int | None,
    transform_input: bool | None,
) -> Side:
    """Load what an argument of the command line names.

    Args:
      spec: of the file; None where it does not say.
      other: spec of the other side: that of a folder of results.
      options: device, threads, image size and so on.
      num_classes: columns of results; None: those of the public weights.
      transform_input: of a checkpoint.
    Raises:
      UserError: a file of no known kind, or that does not load.
    """
    if argument.startswith(reference_models.PREFIXES):
        return _reference(argument, options)
    path = pathlib.Path(argument)
    spec = spec or other
    if spec is None:
        raise UserError(f"--arch: missing; {argument} does not say which network it is of")
    if path.is_dir() and not (path / HUB_WEIGHTS).is_file():
        return _results(argument, spec, num_classes)
    own = dataclasses.replace(options, resume=argument)
    if path.suffix not in (".onnx", ".om"):
        own = dataclasses.replace(own, transform_input=transform_input)
    model = program.load_evaluated_model(spec, own)
    if model.taken:
        print(model.taken, flush=True)
    pipeline = InputPipeline.of(spec, model.image_size)
    background = spec.background_columns(model.num_outputs)
    return ModelSide(
        argument, model.num_outputs, background, model.classes, pipeline, spec, classifier=model.classifier
    )


def _results(argument: str, spec: ModelSpec, num_classes: int | None) -> ResultSide:
    results = postprocess.find_results(argument, "")
    allowed = {num_classes} if num_classes else {spec.num_classes, spec.num_classes + 1}
    num_outputs = len(postprocess.read_row(next(iter(results.values())), allowed))
    return ResultSide(argument, num_outputs, spec.background_columns(num_outputs), spec=spec, results=results)


def _reference(argument: str, options: program.EvalConfig) -> ModelSide:
    from common.device import device as devices
    from common.evaluation.torch_classifier import TorchClassifier

    found = reference_models.load(argument)
    device = devices.choose(options.device, options.device_id)
    device.move(found.model, "nchw")
    plain = TorchClassifier(found.model, lambda pixels: pixels, device)
    classifier = plain.with_normalization(found.pipeline.normalize_into)
    return ModelSide(argument, found.num_classes, 0, None, found.pipeline, classifier=classifier)


class Crops:
    """Transform of a loader: the crops of several pipelines, one after the other, as flat uint8."""

    def __init__(self, pipelines: Sequence[InputPipeline]) -> None:
        self.pipelines = pipelines

    def __call__(self, image: Image.Image) -> np.ndarray:
        nothing = np.zeros(1, np.uint8)  # of two folders of results
        return np.concatenate([pipeline.crop(image).ravel() for pipeline in self.pipelines] or [nothing])

    def split(self, flat: np.ndarray) -> list[np.ndarray]:
        """[N, all crops] -> one array [N, H, W, 3] per pipeline."""
        shapes = [(pipeline.size, pipeline.size, 3) for pipeline in self.pipelines]
        ends = np.cumsum([height * width * channels for height, width, channels in shapes])
        parts = np.split(flat, ends[:-1], axis=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
