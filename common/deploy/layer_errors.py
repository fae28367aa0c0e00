"""tools/compare.py --per-layer: what two models compute after each block, from the same images.

Blocks are matched by the names that the TorchScript exporter gives to nodes (/Mixed_5b/branch1x1/conv/Conv), which
converters to float16 and int8 keep. In files of other programs, which have other names, each block is matched with the
tensor of the same shape whose values are nearest. Legend: N batch, C channel, H W pixel.
"""

import copy
import pathlib
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from common.errors import UserError
from common.evaluation.engines import Engine, EngineClassifier, cpu_session

if typing.TYPE_CHECKING:
    import onnx

    from common.deploy.sides import Side

_RESULT = re.compile(r"(/.*)_output_\d+")
_SIMILAR = 0.5  # error below which two tensors are taken for the same; unrelated ones have more than 1
_THINNED = 50_000  # values of a tensor that are compared to find its match
_NOT_A_RESULT = ("QuantizeLinear", "DequantizeLinear", "Cast", "Constant", "Identity", "Shape", "Reshape", "Flatten")


def layer_errors(a: "Side", b: "Side", images: Sequence[Image.Image]) -> tuple[list[tuple[str, float]], str]:
    """Errors after each block, in the order of the network.

    Returns:
      ((block, root mean square of the difference relative to that of A) of each, one line where they were matched by
      values, which is not certain).
    Raises:
      UserError: a side that is no checkpoint or .onnx file, or no blocks that fit together.
    """
    fixed = [batch for side in (a, b) if (batch := _fixed_batch(side))]
    images = images[: min(fixed, default=len(images))]
    a_blocks, b_blocks = (_outputs(side, images) for side in (a, b))
    errors = [
        (name, _error(value, b_blocks[name]))
        for name, value in a_blocks.items()
        if name in b_blocks and b_blocks[name].shape == value.shape
    ]
    if errors:
        return errors, ""
    a_values, b_values = a_blocks or _outputs(a, images, True), b_blocks or _outputs(b, images, True)
    if a_blocks or not b_blocks:
        total, pairs = len(a_values), _nearest(a_values, b_values)
    else:  # the blocks are B's
        total, pairs = len(b_values), [(theirs, ours) for ours, theirs in _nearest(b_values, a_values)]
    if not pairs:
        raise UserError(
            f"--per-layer: {a.name} and {b.name} have no blocks of the same names, and none with similar values; the "
            "export scripts keep the names"
        )
    note = (
        f"note: {b.name} has no blocks of the names of {a.name}; {len(pairs)} of {total} were matched with tensors of "
        "the same shape and similar values (A = B)"
    )
    return [(f"{ours} = {theirs}", _error(a_values[ours], b_values[theirs])) for ours, theirs in pairs], note


def _error(value: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of `value`."""
    return float(np.sqrt(((value - other) ** 2).mean())) / (float(np.sqrt((value**2).mean())) or 1.0)


def _nearest(blocks: dict[str, np.ndarray], tensors: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """(block, the tensor of its shape with the nearest values) of those where these are similar."""
    by_shape: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        by_shape.setdefault(value.shape, {})[name] = _thinned(value)
    pairs = []
    for name, value in blocks.items():
        errors = {other: _error(_thinned(value), thin) for other, thin in by_shape.get(value.shape, {}).items()}
        best = min(errors, key=errors.__getitem__, default="")
        if best and errors[best] < _SIMILAR:
            pairs.append((name, best))
    return pairs


def _thinned(value: np.ndarray) -> np.ndarray:
    """Evenly spread values, enough to tell tensors apart."""
    return value.ravel()[:: max(1, value.size // _THINNED)]


def _fixed_batch(side: "Side") -> int | None:
    classifier = getattr(side, "classifier", None)
    return classifier.engine.batch if isinstance(classifier, EngineClassifier) else None


def _outputs(side: "Side", images: Sequence[Image.Image], everything: bool = False) -> dict[str, np.ndarray]:
    """Outputs of the blocks; with `everything` all tensors of an .onnx file, by their own names."""
    from common.deploy.sides import ModelSide
    from common.evaluation.torch_classifier import TorchClassifier

    assert isinstance(side, ModelSide) and side.pipeline is not None
    pixels = np.stack([side.pipeline.crop(image) for image in images])
    if isinstance(side.classifier, TorchClassifier):
        return _torch_outputs(side.classifier, pixels)
    if isinstance(side.classifier, EngineClassifier) and pathlib.Path(side.name).suffix == ".onnx":
        return _onnx_outputs(side.name, side.classifier, pixels, everything)
    raise UserError(f"--per-layer: {side.name} is neither a checkpoint nor an .onnx file")


def _torch_outputs(classifier: Any, pixels_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of all modules, by their names; that of a convolution includes the batch norm behind it, as in ONNX."""
    import torch

    found: dict[str, np.ndarray] = {}
    returned_by: dict[
        int, tuple[torch.Tensor, list[str]]
    ] = {}  # by id; the tensor is kept, so that its id stays its own

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, torch.Tensor):
                return
            value = output.float().cpu().numpy().copy()  # a following in-place ReLU would change it
            returned_by.setdefault(id(output), (output, []))[1].append(name)
            found[name] = value
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and id(inputs[0]) in returned_by:
                found.update((producer, value) for producer in returned_by[id(inputs[0])][1])

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in classifier.model.named_modules() if name]
    try:
        classifier(torch.from_numpy(pixels_NHWC))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _onnx_outputs(
    path: str, classifier: EngineClassifier, pixels_NHWC: np.ndarray, everything: bool
) -> dict[str, np.ndarray]:
    """The last result within the scope of each module, by the module's name; or all results."""
    import onnx

    proto = onnx.shape_inference.infer_shapes(onnx.load(path))
    known = {value.name: value for value in (*proto.graph.value_info, *proto.graph.output)}
    results = _all_results(proto) if everything else _last_results(proto)
    tensors = {module: tensor for module, tensor in results if tensor in known}
    names = [proto.graph.output[0].name]
    names += [tensor for tensor in dict.fromkeys(tensors.values()) if tensor not in names]
    del proto.graph.output[:]
    proto.graph.output.extend(known[name] for name in names)
    recorder = _Recorder(classifier.engine, cpu_session(proto))
    observed = copy.copy(classifier)
    observed.engine = recorder
    observed(pixels_NHWC)
    values = {name: value.astype(np.float32) for name, value in zip(names, recorder.outputs, strict=True)}
    return {module: values[tensor] for module, tensor in tensors.items()}


class _Recorder:
    """An Engine whose session puts out further tensors; keeps those of the last run."""

    def __init__(self, engine: Engine, session: Any) -> None:
        self.sample_shape, self.dtype, self.batch = engine.sample_shape, engine.dtype, engine.batch
        self.num_outputs, self.metadata = engine.num_outputs, engine.metadata
        self._session, self.outputs, self.streams = session, list[np.ndarray](), 0

    def run(self, images: np.ndarray) -> np.ndarray:
        self.outputs = self._session.run(None, {self._session.get_inputs()[0].name: np.asarray(images, self.dtype)})
        return self.outputs[0]


def _last_results(proto: "onnx.ModelProto") -> Iterator[tuple[str, str]]:
    """(module, output of the last node in its scope); of an int8 file what the next node reads, clipped as by ReLU."""
    read = [{n.input[0]: n.output[0] for n in proto.graph.node if n.op_type == kind} for kind in _NOT_A_RESULT[:2]]
    for node in proto.graph.node:
        # Quantization moves nodes and keeps the names of results: /Mixed_5b/branch1x1/Relu_output_0.
        match = _RESULT.fullmatch(node.output[0])
        name = match[1] if match else "" if node.output[0].startswith("/") else node.name
        if node.op_type in _NOT_A_RESULT or not name.startswith("/"):
            continue
        scopes = name.split("/")[1:-1]
        path: list[str] = []
        for scope in scopes:
            # A child of a Sequential is written as PARENT.NUMBER below its parent.
            path.append(scope.rpartition(".")[2] if path and scope.startswith(f"{_last_word(path)}.") else scope)
            # An export with float16 input wraps the network as `model`.
            yield ".".join(path).removeprefix("model."), read[1].get(read[0].get(node.output[0], ""), node.output[0])


def _all_results(proto: "onnx.ModelProto") -> Iterator[tuple[str, str]]:
    for node in proto.graph.node:
        if node.op_type not in _NOT_A_RESULT:
            yield node.output[0], node.output[0]


def _last_word(path: Sequence[str]) -> str:
    return next((part for part in reversed(path) if not part.isdigit()), "")
