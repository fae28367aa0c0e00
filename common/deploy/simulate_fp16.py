"""run_onnx.py --simulate-fp16: what float16 on the device does to each layer, computed on a CPU.

atc's default computes in float16: weights and the results of layers are float16, sums inside a layer are float32. Here
ONNX Runtime computes in float32, and weights and the output of every node are rounded to float16. Values beyond 65504
become infinite, as on Atlas A2 and later; the older chips saturate at 65504 instead.

One graph holds the network three times: in float32; rounded throughout; and each node alone, whose inputs are the
float32 ones rounded. It puts out sums only, so a run needs no more memory than inference.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import UserError
from common.evaluation import engines

if TYPE_CHECKING:
    import onnx

MAX_FLOAT16 = float(np.finfo(np.float16).max)
_SUMS = ("sum_alone", "sum_network", "sum_exact", "largest")  # outputs of the graph for each layer


@dataclasses.dataclass
class Layer:
    """Errors of one node, the largest over all runs, relative to the root mean square of its float32 output.

    Attributes:
      error: of the node alone, given the exact inputs rounded to float16.
      network_error: after all earlier nodes were rounded, too.
      largest: magnitude of its largest output in float32.
    """

    name: str
    op_type: str
    error: float = 0.0
    network_error: float = 0.0
    largest: float = 0.0

    @property
    def overflows(self) -> bool:
        return self.largest > MAX_FLOAT16

    def add(self, alone: float, network: float, reference: float, largest: float) -> None:
        """Add a run, given sums of squares of the two errors and of the reference."""
        self.error = max(self.error, _relative(alone, reference))
        self.network_error = max(self.network_error, _relative(network, reference))
        self.largest = max(self.largest, largest)


def _relative(error: float, reference: float) -> float:
    """Ratio of root mean squares; infinite if a value overflowed."""
    if not math.isfinite(error):
        return math.inf
    return math.sqrt(error / reference) if reference > 0 else (0.0 if error == 0 else math.inf)


class Simulation:
    """An ONNX model in float32 and in float16.

    Attributes:
      layers: in the order of the graph.
      num_images: that were run.
      changed: (name, top-1 in float32, top-1 in float16) of the images whose top-1 differs.
    Raises:
      UserError: a model with control flow, or whose output is not float32.
    """

    def __init__(self, path: str | pathlib.Path, threads: int = 0) -> None:
        proto, self.layers, self._last = _three_networks(path)
        # The outputs of nodes that are fused could not be rounded.
        self._session = engines.cpu_session(proto, threads, fuses_nodes=False)
        self.num_images = 0
        self.changed: list[tuple[str, int, int]] = []

    def run(self, images: np.ndarray, names: Sequence[str]) -> None:
        """Add a batch; only its first len(names) images are compared, the others fill it up."""
        exact, rounded, *sums = self._session.run(None, {self._session.get_inputs()[0].name: images})
        for layer, values in zip(self.layers, np.reshape(sums, (-1, len(_SUMS))), strict=True):
            layer.add(*map(float, values))
        pairs = [np.reshape(each, (len(images), -1)).argmax(axis=1).tolist() for each in (exact, rounded)]
        self.num_images += len(names)
        self.changed += [(name, a, b) for name, a, b in zip(names, *pairs, strict=False) if a != b]

    def report(self, rows: int) -> Iterator[str]:
        """Lines of the table, largest error first, and what it means.

        Args:
          rows: layers to list; 0: all.
        """
        ordered = sorted(
            self.layers, key=lambda layer: -layer.error
        )  # stable: the first of several that overflow leads
        shown = ordered[: rows or None]
        width = max(len(layer.name) for layer in shown)
        yield f"{'layer':{width}}  {'operator':20}  {'error':>9}  {'accumulated':>11}  {'largest value':>13}"
        for layer in shown:
            yield (
                f"{layer.name:{width}}  {layer.op_type:20}  {layer.error:9.2e}  {layer.network_error:11.2e}  "
                f"{layer.largest:13.4g}{'  overflow' if layer.overflows else ''}"
            )
        if len(shown) < len(ordered):
            yield f"{len(ordered) - len(shown)} more layers with an error of at most {shown[-1].error:.2e}"
        overflowing = [layer.name for layer in self.layers if layer.overflows]
        if overflowing:
            yield f"overflow: {len(overflowing)} layers exceed {MAX_FLOAT16:g}, the first is {overflowing[0]}"
        listed = ", ".join(f"{name} ({a} -> {b})" for name, a, b in self.changed[:5])
        more = f" and {len(self.changed) - 5} more" if len(self.changed) > 5 else ""
        yield (
            f"top-1: differs for {len(self.changed)} of {self.num_images} images"
            f"{': ' if listed else ''}{listed}{more}; error of the logits {self._last.network_error:.2e}"
        )


def _three_networks(path: str | pathlib.Path) -> "tuple[onnx.ModelProto, list[Layer], Layer]":
    """(graph of Simulation, its layers, that of the logits); outputs are the logits twice, and four sums a layer."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    proto = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph = proto.graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        raise UserError(f"--model: {path} has control flow, which --simulate-fp16 cannot follow")
    known = (*graph.input, *graph.value_info, *graph.output)
    floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    for tensor in [each for each in graph.initializer if each.data_type == TensorProto.FLOAT]:
        floats.add(tensor.name)
        with np.errstate(over="ignore"):
            rounded = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(rounded, f"{tensor.name}/network"))
    nodes = list(graph.node)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name in floats and value.name not in weights]
    for name in inputs:
        graph.node.extend(_rounding(name, f"{name}/network"))
    # Names of a value: x in float32, x/network where all earlier ones were rounded, x/rounded for x itself rounded.
    in_network = {name: f"{name}/network" for name in floats}
    for node in nodes:
        in_network.update({name: f"{name}/network" for name in node.output if name})
    is_rounded_exactly = floats & (weights | set(inputs))
    layers = dict[str, Layer]()  # by its first output
    for node in nodes:
        results = [name for name in node.output if name in floats]
        network = _renamed(node, "network", in_network)
        raw = {name: f"{name}/unrounded" for name in results}
        network.output[:] = [f"{raw[name]}" if name in raw else in_network.get(name, name) for name in node.output]
        graph.node.append(network)
        for name in results:
            graph.node.extend(_rounding(raw[name], in_network[name]))
            graph.node.extend(_rounding(name, f"{name}/rounded"))
        if not results or node.op_type == "Constant":
            continue
        alone = _renamed(node, "alone", {})
        for i, name in enumerate(node.input):
            if name in is_rounded_exactly:
                alone.input[i] = in_network[name]
            elif name in floats:
                alone.input[i] = f"{name}/rounded"
        alone.output[:] = [f"{name}/alone" if name else "" for name in node.output]
        graph.node.append(alone)
        result = results[0]
        graph.node.extend(_rounding(f"{result}/alone", f"{result}/alone_rounded"))
        graph.node.extend(_error_nodes(result, f"{result}/alone_rounded", in_network[result]))
        layers[result] = Layer(node.name or result, node.op_type)
    logits = graph.output[0].name
    if logits not in layers:
        raise UserError(f"--model: the output {logits} of {path} is not computed in float32; nothing to simulate")
    del graph.output[:]
    for name in (logits, in_network[logits], *(f"{result}/{each}" for result in layers for each in _SUMS)):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return proto, list(layers.values()), layers[logits]


def _renamed(node: "onnx.NodeProto", suffix: str, names: dict[str, str]) -> Any:
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{node.name or node.output[0]}/{suffix}"
    copy.input[:] = [names.get(name, name) for name in node.input]
    return copy


def _rounding(name: str, result: str) -> Iterator[Any]:
    """float32 -> float16 -> float32."""
    from onnx import TensorProto, helper

    yield helper.make_node("Cast", [name], [f"{result}/float16"], to=TensorProto.FLOAT16)
    yield helper.make_node("Cast", [f"{result}/float16"], [result], to=TensorProto.FLOAT)


def _error_nodes(exact: str, alone: str, network: str) -> Iterator[Any]:
    """Sums of squares of both errors and of the exact values, and their largest magnitude."""
    from onnx import helper

    for other, name in ((alone, "alone"), (network, "network")):
        yield helper.make_node("Sub", [exact, other], [f"{exact}/error_{name}"])
        yield helper.make_node("ReduceSumSquare", [f"{exact}/error_{name}"], [f"{exact}/sum_{name}"], keepdims=0)
    yield helper.make_node("ReduceSumSquare", [exact], [f"{exact}/sum_exact"], keepdims=0)
    yield helper.make_node("Abs", [exact], [f"{exact}/magnitude"])
    yield helper.make_node("ReduceMax", [f"{exact}/magnitude"], [f"{exact}/largest"], keepdims=0)
