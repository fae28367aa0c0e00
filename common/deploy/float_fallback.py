"""An int8 network that computes an image again in float32 where its two largest logits are nearly equal.

int8 adds noise to the logits, which changes the top-1 only where the two largest are closer than that noise. Layers in
float32 slow down every image, a second pass in float32 slows down these few.
"""

import typing

import numpy as np

if typing.TYPE_CHECKING:
    import onnx

_FLOAT32, _PREFIX = "float32/", "fallback/"  # of the names of the float32 network, and of what connects both


def joined(int8: "onnx.ModelProto", float32: "onnx.ModelProto", margin: float) -> "onnx.ModelProto":
    """One network [N, C, H, W] -> [N, K]: int8 logits, float32 ones where the two largest are closer than `margin`.

    Args:
      int8, float32: networks of one input and one output, with the same classes and opset.
    """
    import onnx
    from onnx import helper, numpy_helper

    proto = onnx.ModelProto()
    proto.CopyFrom(int8)
    graph, again = proto.graph, onnx.compose.add_prefix(float32, _FLOAT32).graph
    constants = {
        "two": np.array([2]),
        "difference": np.array([[1], [-1]], np.float32),
        "margin": np.array(margin, np.float32),
        "zero": np.array(0),
        "columns": np.array([1]),
    }
    graph.initializer.extend(numpy_helper.from_array(value, _PREFIX + name) for name, value in constants.items())

    image, output = graph.input[0].name, graph.output[0].name
    short = {"image": image, "output": output, "image_again": again.input[0].name, "exact": again.output[0].name}

    def node(kind: str, inputs: str, outputs: str, **options: typing.Any) -> "onnx.NodeProto":
        read, written = ([short.get(name, _PREFIX + name) for name in each.split()] for each in (inputs, outputs))
        return helper.make_node(kind, read, written, f"{written[0]}/{kind}", **options)

    for each in graph.node:
        for names in (each.input, each.output):
            names[:] = [f"{_PREFIX}int8" if name == output else name for name in names]
    again.node.insert(0, node("Gather", "image close", "image_again"))
    again.node.extend([node("Unsqueeze", "close columns", "rows"), node("ScatterND", "int8 rows exact", "some_exact")])
    del again.input[:], again.output[:]
    unchanged = onnx.GraphProto(name="unchanged", node=[node("Identity", "int8", "none_exact")])
    for branch, name in ((again, "some_exact"), (unchanged, "none_exact")):
        branch.output.append(onnx.ValueInfoProto(name=_PREFIX + name, type=graph.output[0].type))
    graph.node.extend(
        [
            node("TopK", "int8 two", "largest classes", axis=1),
            node("MatMul", "largest difference", "distance"),
            node("Less", "distance margin", "is_close"),
            node("NonZero", "is_close", "places"),
            node("Gather", "places zero", "close"),
            node("Size", "close", "count"),
            node("Greater", "count zero", "any"),
            node("If", "any", "output", then_branch=again, else_branch=unchanged),
        ]
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto
