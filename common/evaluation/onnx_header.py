"""Input, outputs, metadata and operators of an .onnx file, read in milliseconds without its weights or an engine.

The file is a protobuf message (onnx.proto of ONNX): fields of a number and a wire type. Messages that are not needed,
above all the weights, are skipped.
"""

import mmap
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence

_VARINT, _LENGTH = 0, 2  # wire types
_FIXED_LENGTHS = {1: 8, 5: 4}  # wire type: bytes
# Numbers of the fields that are read, by message.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_WEIGHTS, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_OPERATOR, _WEIGHTS_NAME = 4, 8
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR = 1, 2, 1
_TENSOR_ELEMENT, _TENSOR_SHAPE, _SHAPE_AXIS, _AXIS_SIZE, _AXIS_NAME = 1, 2, 1, 1, 2
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_DTYPES = {1: "float32", 2: "uint8", 10: "float16"}


class Value(typing.NamedTuple):
    """An input or output of the graph.

    Attributes:
      dtype: of numpy; empty for one that no exported classifier has.
      shape: an open axis is its name, or None.
    """

    name: str
    dtype: str
    shape: Sequence[int | str | None]


class OnnxHeader(typing.NamedTuple):
    """What a file says about itself.

    Attributes:
      inputs: without the weights, which old files list as inputs too.
      operators: types of the nodes.
    """

    inputs: Sequence[Value]
    outputs: Sequence[Value]
    metadata: Mapping[str, str]
    operators: frozenset[str]

    @property
    def is_classifier(self) -> bool:
        """Whether there is one input of images, and the number of classes is known."""
        return (
            len(self.inputs) == 1
            and self.inputs[0].dtype != ""
            and len(self.inputs[0].shape) == 4
            and bool(self.outputs and self.outputs[0].shape and isinstance(self.outputs[0].shape[-1], int))
        )


def read(path: pathlib.Path) -> OnnxHeader | None:
    """The header of a file; None where it is no ONNX file, or a damaged one."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _model(content)
    except (OSError, ValueError, LookupError):
        return None


_Span = tuple[int, int]


def _model(content: mmap.mmap) -> OnnxHeader | None:
    graph: _Span | None = None
    metadata: dict[str, str] = {}
    for number, found in _fields(content, (0, len(content))):
        if number == _MODEL_GRAPH:
            graph = _span(found)
        elif number == _MODEL_METADATA:
            entry = dict(_fields(content, _span(found)))
            metadata[_text(content, entry[_ENTRY_KEY])] = (
                _text(content, entry[_ENTRY_VALUE]) if _ENTRY_VALUE in entry else ""
            )
    if graph is None:
        return None
    inputs, outputs, operators, weights = list[Value](), list[Value](), set[str](), set[str]()
    for number, found in _fields(content, graph):
        if number == _GRAPH_NODE:
            operators |= {
                _text(content, part) for field, part in _fields(content, _span(found)) if field == _NODE_OPERATOR
            }
        elif number == _GRAPH_WEIGHTS:
            names = (part for field, part in _fields(content, _span(found)) if field == _WEIGHTS_NAME)
            weights |= {_text(content, name) for name in names}
        elif number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            (inputs if number == _GRAPH_INPUT else outputs).append(_value(content, _span(found)))
    return OnnxHeader([each for each in inputs if each.name not in weights], outputs, metadata, frozenset(operators))


def _value(content: mmap.mmap, span: _Span) -> Value:
    fields = dict(_fields(content, span))
    kind = dict(_fields(content, _span(fields[_VALUE_TYPE]))) if _VALUE_TYPE in fields else {}
    tensor = dict(_fields(content, _span(kind[_TYPE_TENSOR]))) if _TYPE_TENSOR in kind else {}
    shape: list[int | str | None] = []
    for number, found in _fields(content, _span(tensor[_TENSOR_SHAPE])) if _TENSOR_SHAPE in tensor else ():
        if number == _SHAPE_AXIS:
            side = dict(_fields(content, _span(found)))
            value = side.get(_AXIS_SIZE)
            shape.append(value if isinstance(value, int) else _text(content, side[_AXIS_NAME]) if side else None)
    element = tensor.get(_TENSOR_ELEMENT, 0)
    dtype = _DTYPES.get(element, "") if isinstance(element, int) else ""
    return Value(_text(content, fields[_VALUE_NAME]) if _VALUE_NAME in fields else "", dtype, shape)


def _fields(content: mmap.mmap, span: _Span) -> Iterator[tuple[int, int | _Span]]:
    """(Number, integer or span of bytes) of each field of a message.

    Raises:
      ValueError, LookupError: it is none.
    """
    at, end = span
    while at < end:
        key, at = _varint(content, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(content, at)
            yield number, value
            continue
        length, at = _varint(content, at) if wire == _LENGTH else (_FIXED_LENGTHS[wire], at)
        if at + length > end:
            raise ValueError(f"field {number} ends after its message")
        yield number, (at, at + length)
        at += length


def _varint(content: mmap.mmap, at: int) -> tuple[int, int]:
    """(Value, position behind it) of an integer of 7 bits a byte."""
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


def _span(found: int | _Span) -> _Span:
    if isinstance(found, int):
        raise ValueError("an integer in place of a message")
    return found


def _text(content: mmap.mmap, found: int | _Span) -> str:
    start, end = _span(found)
    return content[start:end].decode()
