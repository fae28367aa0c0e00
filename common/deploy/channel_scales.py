"""Channels of activations scaled to more equal ranges, so that one scale for all of them rounds each of them finely.

A channel whose values stay small is multiplied, and the weights that read it are divided: relu(x f) = relu(x) f for
f > 0. Source: Nagel et al., arXiv 1906.04721, section 4.1, which equalizes the ranges of weights; here the ranges are
those of activations. docs/QUANTIZE.md says when it helps.
"""

import typing
from collections.abc import Callable

import numpy as np

from common.deploy import int8_graph
from common.deploy.calibrate import open_session
from common.progress import Progress

if typing.TYPE_CHECKING:
    import onnx

EXPONENT = 0.75  # of a channel's share of the largest range: 0 leaves the channels, 1 gives all of them one range
LARGEST_FACTOR = 64.0
_KEEP_CHANNELS = ("Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Identity")
Factors = dict[str, np.ndarray]  # output of a Relu -> factor of each of its channels


class Channels:
    """Which channels of a graph of int8_graph.prepare can be scaled.

    Attributes:
      convs: output of a Relu -> the convolution that it alone reads, an average pool between them or not.
      sources: tensor -> the outputs of Relus whose channels it holds, in order.
    """

    def __init__(self, proto: "onnx.ModelProto") -> None:
        self._proto, self._graph = proto, int8_graph.Graph(proto.graph)
        self.convs: dict[str, onnx.NodeProto] = {}
        self.sources: dict[str, list[str]] = {}
        self._producers = {name: node for node in proto.graph.node for name in node.output}
        for node in proto.graph.node:
            held = [self.sources.get(name) for name in node.input]
            if node.op_type == "Relu":
                conv = self._read_alone(node)
                if conv is not None and conv.op_type == "AveragePool":  # moved behind its convolution
                    conv = self._read_alone(conv)
                if conv is not None and conv.op_type == "Conv":
                    self.convs[node.output[0]] = conv
                    self.sources[node.output[0]] = [node.output[0]]
            elif node.op_type in _KEEP_CHANNELS and all(held) and int8_graph.attributes(node).get("axis", 1) == 1:
                self.sources[node.output[0]] = [name for names in held if names for name in names]
        self._leave_out({name for node in proto.graph.node for name in self._as_they_are(node)})
        self._leave_out({name for output in proto.graph.output for name in self.sources.get(output.name, ())})

    def _read_alone(self, node: "onnx.NodeProto") -> "onnx.NodeProto | None":
        """The node whose output no other node than this one reads."""
        source = node.input[0]
        return self._producers.get(source) if len(self._graph.consumers(source)) == 1 else None

    def _as_they_are(self, node: "onnx.NodeProto") -> list[str]:
        """Outputs of Relus whose values the node needs unscaled."""
        if node.output[0] in self.sources:
            return []
        held = [name for source in node.input for name in self.sources.get(source, ())]
        if not held or node.op_type not in ("Conv", "Gemm"):
            return held
        weight, channels = self._graph.value(node.input[1]), sum(map(self._num_channels, held))
        if weight is None or node.input[0] not in self.sources:
            return held
        options = int8_graph.attributes(node)
        groups, axis = options.get("group", 1), 1 if node.op_type == "Conv" or options.get("transB", 0) else 0
        takes_all = groups == 1 and weight.shape[axis] == channels
        return [] if takes_all or (groups == channels and weight.shape[1] == 1) else held

    def _num_channels(self, name: str) -> int:
        weight = self._graph.value(self.convs[name].input[1])
        return 0 if weight is None else len(weight)

    def _leave_out(self, names: set[str]) -> None:
        """Leave these channels as they are, and all that share a tensor with them."""
        while more := {each for held in self.sources.values() if names & {*held} for each in held} - names:
            names |= more
        self.convs = {name: conv for name, conv in self.convs.items() if name not in names}
        self.sources = {tensor: held for tensor, held in self.sources.items() if not names & {*held}}

    def groups(self) -> list[set[str]]:
        """Outputs of Relus that a Concat joins; they share one scale, so that it does not round again."""
        found: list[set[str]] = []
        for held in self.sources.values():
            joined = set(held).union(*(group for group in found if group & {*held}))
            found = [group for group in found if not group & joined] + [joined]
        return found

    def factors(self, batches: Callable[[int], np.ndarray], num_batches: int) -> Factors:
        """Factors by the largest value of each channel over batches of images [N, C, H, W], by their numbers."""
        names, largest = list(self.convs), dict[str, np.ndarray]()
        session = open_session(self._proto, names)
        image = session.get_inputs()[0].name
        with Progress(num_batches, "batches for channel ranges") as advance:
            for number in range(num_batches):
                for name, values in zip(names, session.run(names, {image: batches(number)}), strict=True):
                    found = values.max((0, 2, 3))
                    largest[name] = np.maximum(largest.get(name, found), found)
                advance(1)
        result = {}
        for group in self.groups():
            high = max(float(largest[name].max()) for name in group)
            for name in group:
                share = largest[name].astype(np.float64) / high if high else np.ones(len(largest[name]))
                result[name] = np.maximum(share, 1e-30) ** -EXPONENT
        return {name: np.minimum(factors, LARGEST_FACTOR) for name, factors in result.items()}

    def of_tensors(self, factors: Factors) -> Factors:
        """Tensor -> factors of its channels; tensors that stay as they are have none."""
        return {tensor: np.concatenate([factors[name] for name in held]) for tensor, held in self.sources.items()}


def scaled(proto: "onnx.ModelProto", factors: Factors) -> "onnx.ModelProto":
    """Copy of the graph whose channels are multiplied by `factors`; it computes the same logits in real numbers."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    channels = Channels(copy)
    graph, of_inputs = int8_graph.Graph(copy.graph), channels.of_tensors(factors)
    of_conv = {conv.output[0]: factors[name] for name, conv in channels.convs.items()}
    for node in copy.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        read, written = of_inputs.get(node.input[0]), of_conv.get(node.output[0])
        if read is None and written is None:
            continue
        weight = graph.value(node.input[1])
        assert weight is not None
        weight = weight.astype(np.float64)
        options = int8_graph.attributes(node)
        if read is not None:
            is_column = (node.op_type == "Conv" and options.get("group", 1) == 1) or options.get("transB", 0)
            shape = [1] * weight.ndim
            shape[1 if is_column else 0] = -1
            weight = weight / read.reshape(shape)
        if written is not None:
            weight = weight * written.reshape(-1, 1, 1, 1)
            if len(node.input) > 2:
                bias = graph.value(node.input[2])
                assert bias is not None
                node.input[2] = graph.add_weight(f"{node.output[0]}/scaled_bias", bias * written)
        node.input[1] = graph.add_weight(f"{node.output[0]}/scaled_weight", weight)
    int8_graph.remove_unused(copy.graph)
    del copy.graph.value_info[:]
    onnx.checker.check_model(copy, full_check=True)
    return onnx.shape_inference.infer_shapes(copy)
