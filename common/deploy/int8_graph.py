"""What an ONNX graph needs before quantization: opset 13, batch norms and input scaling folded, cheap pools.

Each rewrite keeps the function in real numbers; common.deploy.quantize compares the logits.
"""

import math
import typing
from collections.abc import Container, Mapping

import numpy as np

from common.errors import UserError

if typing.TYPE_CHECKING:
    import onnx

OPSET = 13  # the first whose DequantizeLinear takes one scale per channel


def raised(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """The model at opset 13 or later, checked with shape inference.

    Raises:
      UserError: onnx cannot convert it.
    """
    import onnx

    opset = {entry.domain: entry.version for entry in proto.opset_import}.get("", 0)
    if opset < OPSET:
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        try:
            proto = onnx.version_converter.convert_version(proto, OPSET)
        except Exception as error:  # onnx raises RuntimeError and types of its own
            text = str(error).splitlines()[0]
            raise UserError(
                f"IN: has opset {opset}, and onnx cannot raise it to {OPSET} ({text}); export it with --opset {OPSET}"
            ) from error
        onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto, full_check=True)
    return proto


class Graph:
    """Producers, consumers and constants of a graph by name of value."""

    def __init__(self, graph: "onnx.GraphProto") -> None:
        from onnx import numpy_helper

        self.graph = graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.constants = {  # of Constant nodes
            node.output[0]: numpy_helper.to_array(node.attribute[0].t)
            for node in graph.node
            if node.op_type == "Constant" and node.attribute[0].name == "value"
        }
        for node in graph.node:  # the exporter stores equal weights once
            if node.op_type == "Identity" and (array := self.value(node.input[0])) is not None:
                self.constants[node.output[0]] = array
        self.outputs = {value.name for value in graph.output}

    def value(self, name: str) -> np.ndarray | None:
        from onnx import numpy_helper

        if name in self.weights:
            return numpy_helper.to_array(self.weights[name])
        return self.constants.get(name)

    def consumers(self, name: str) -> "list[onnx.NodeProto]":
        return [node for node in self.graph.node if name in node.input]

    def add_weight(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        self.weights[name] = self.graph.initializer[-1]
        return name


def attributes(node: "onnx.NodeProto") -> Mapping[str, typing.Any]:
    """Attributes of a node by name."""
    import onnx

    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def prepare(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """Copy of a model, rewritten for quantization.

    An affine map of the input is folded into a first convolution without padding. An average pool of 3 x 3, stride 1,
    that only a 1 x 1 convolution reads, moves behind that convolution: there it has a quarter to an eighth of the
    channels, and ONNX Runtime's int8 average pool is its slowest kernel. A pool that counts the padding
    becomes a depthwise convolution.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    _fold_input_affine(Graph(copy.graph))
    for pool in [node for node in copy.graph.node if node.op_type == "AveragePool"]:
        _move_pool(Graph(copy.graph), pool)
    remove_unused(copy.graph)
    del copy.graph.value_info[:]
    onnx.checker.check_model(copy, full_check=True)
    return onnx.shape_inference.infer_shapes(copy)


def remove_unused(graph: "onnx.GraphProto") -> None:
    """Remove constants and weights that no node reads."""
    used = {name for each in graph.node for name in each.input} | {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if node.op_type in ("Constant", "Identity") and node.output[0] not in used:
            graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [each for each in graph.initializer if each.name not in used]:
        graph.initializer.remove(tensor)


def _fold_input_affine(graph: Graph) -> None:
    """image * scale + offset -> conv, without padding: scale goes into its weights, offset into its bias."""
    name = graph.graph.input[0].name
    factors: dict[str, np.ndarray] = {}
    nodes = []
    for kind in ("Mul", "Add"):
        readers = graph.consumers(name)
        if len(readers) != 1 or readers[0].op_type != kind:
            return
        others = [graph.value(each) for each in readers[0].input if each != name]
        if len(others) != 1 or others[0] is None or others[0].size not in (1, 3) or others[0].ndim not in (0, 3, 4):
            return
        factors[kind] = np.broadcast_to(others[0].reshape(-1), 3).astype(np.float64)
        nodes.append(readers[0])
        name = readers[0].output[0]
    readers = graph.consumers(name)
    if len(readers) != 1 or readers[0].op_type != "Conv" or name in graph.outputs:
        return
    conv = readers[0]
    weight, found = graph.value(conv.input[1]), attributes(conv)
    if (
        weight is None
        or weight.shape[1] != 3
        or any(found.get("pads", [0]))
        or found.get("auto_pad", b"")
        not in (
            b"",
            b"NOTSET",
            b"VALID",
        )
    ):
        return
    bias = graph.value(conv.input[2]) if len(conv.input) > 2 else np.zeros(len(weight))
    assert bias is not None
    wide = weight.astype(np.float64)
    new_bias = bias + (wide * factors["Add"][None, :, None, None]).sum((1, 2, 3))
    conv.input[:] = [
        graph.graph.input[0].name,
        graph.add_weight(f"{conv.input[1]}/folded", wide * factors["Mul"][None, :, None, None]),
        graph.add_weight(f"{conv.output[0]}/bias", new_bias),
    ]
    for node in nodes:
        graph.graph.node.remove(node)


def _move_pool(graph: Graph, pool: "onnx.NodeProto") -> None:
    import onnx

    found, readers = attributes(pool), graph.consumers(pool.output[0])
    if len(readers) != 1 or readers[0].op_type != "Conv" or pool.output[0] in graph.outputs:
        return
    conv, kernel = readers[0], list(found.get("kernel_shape", ()))
    weight, of_conv = graph.value(conv.input[1]), attributes(conv)
    is_pointwise = (
        weight is not None
        and weight.shape[2:] == (1, 1)
        and of_conv.get("group", 1) == 1
        and not any(of_conv.get("pads", [0]))
        and set(of_conv.get("strides", [1])) == {1}
    )
    pads = [side // 2 for side in kernel] * 2
    keeps_size = (
        all(side % 2 for side in kernel)
        and list(found.get("pads", ())) == pads
        and set(found.get("strides", [1])) == {1}
        and set(found.get("dilations", [1])) == {1}
        and not found.get("ceil_mode", 0)
    )
    if weight is None or not is_pointwise or not keeps_size or weight.shape[0] > weight.shape[1]:
        return
    result, before = conv.output[0], f"{conv.output[0]}/unpooled"
    counts_padding = bool(found.get("count_include_pad", 0))
    if counts_padding:  # the bias must not be averaged with the padding
        channels = weight.shape[0]
        taps = np.full((channels, 1, *kernel), 1 / math.prod(kernel))
        inputs = [before, graph.add_weight(f"{result}/pool", taps), *conv.input[2:]]
        moved = onnx.helper.make_node(
            "Conv", inputs, [result], pool.name, kernel_shape=kernel, pads=pads, group=channels
        )
        del conv.input[2:]
    else:  # the average of a constant is the constant
        moved = onnx.helper.make_node("AveragePool", [before], [result], pool.name)
        moved.attribute.extend(pool.attribute)
    first = onnx.NodeProto()
    first.CopyFrom(conv)
    first.input[0], first.output[0] = pool.input[0], before
    # In place: the pool's node comes first in the graph and becomes the convolution, and the other way round.
    pool.CopyFrom(first)
    conv.CopyFrom(moved)


def keep_float(proto: "onnx.ModelProto", layers: Container[str]) -> None:
    """Make ONNX Runtime compute the convolutions `layers` of a QDQ network in float32.

    Its pass WeightBiasQuantization (in 1.31) turns the float weights between a DequantizeLinear and a QuantizeLinear
    into int8 with one scale for all channels. It leaves a convolution alone whose DequantizeLinear has one scale per
    channel: here each gets its own, with equal scales.
    """
    import onnx

    graph = Graph(proto.graph)
    producers = {name: node for node in proto.graph.node for name in node.output}
    for conv in [node for node in proto.graph.node if node.op_type == "Conv" and node.name in layers]:
        source, weight = producers.get(conv.input[0]), graph.value(conv.input[1])
        if source is None or source.op_type != "DequantizeLinear" or weight is None:
            continue
        channels = weight.shape[1] * attributes(conv).get("group", 1)
        values, result = [source.input[0]], f"{conv.output[0]}/input"
        for name in source.input[1:]:
            parameter = graph.value(name)
            assert parameter is not None
            array = np.broadcast_to(parameter, channels).copy()
            values.append(f"{result}/{len(values)}")
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, values[-1]))
        node = onnx.helper.make_node("DequantizeLinear", values, [result], result, axis=1)
        proto.graph.node.insert(list(proto.graph.node).index(conv), node)
        conv.input[0] = result
