"""MindSpore's `.ckpt` files, read and written without MindSpore.

A file is a sequence of protobuf messages, which protobuf reads as one message (proto2):

    message Checkpoint  { repeated Value value = 1; }
    message Value       { required string tag = 1; optional TensorProto tensor = 2; }    // 3: hash tables, refused
    message TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3; }

`tensor_type` is MindSpore's name of the type ("Float32"), `tensor_content` the little-endian bytes. A tensor above
512 MB is stored as several consecutive values of one tag, each with the dims of the whole tensor. A scalar has no dims
or dims [0]. With `crc_check` the file ends in "crc_num" and ten big-endian bytes: the CRC-32 of the bytes before.
"""

import binascii
import functools
import pathlib
from typing import Any

import torch

from common.errors import UserError
from common.files import StrPath
from common.spec import StateDict

CHUNK_BYTES = 512 * 2**20
_CRC_MARK, _CRC_BYTES = b"crc_num", 10
_TYPES = {
    "Float16": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float32": torch.float32,
    "Float64": torch.float64,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "UInt8": torch.uint8,
    "Bool": torch.bool,
}
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
# Batch norm: MindSpore's names and torch's.
_NORM_NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
# Prefixes of MindSpore's optimizer state, one tensor per parameter; its counters and rates have names without a dot.
_OPTIMIZER_STATE = ("moments.", "moment.", "moment1.", "moment2.", "accum.", "mean_square.", "mean_grad.")


def read(path: StrPath) -> dict[str, torch.Tensor]:
    """Read the network of a MindSpore checkpoint: CPU tensors under torch's names (`bn1.gamma` -> `bn1.weight`).

    Raises:
      UserError: damaged, encrypted, or holds something else than tensors.
    """
    return {
        _torch_name(tag): tensor
        for tag, tensor in read_raw(path).items()
        if "." in tag and not tag.startswith(_OPTIMIZER_STATE)
    }


def read_raw(path: StrPath) -> dict[str, torch.Tensor]:
    """Every tensor of a MindSpore checkpoint under its tag, text values left out. Raises: see `read`."""
    content = pathlib.Path(path).read_bytes()
    if content[-_CRC_BYTES - len(_CRC_MARK) : -_CRC_BYTES] == _CRC_MARK:
        stated, content = int.from_bytes(content[-_CRC_BYTES:], "big"), content[: -_CRC_BYTES - len(_CRC_MARK)]
        if binascii.crc32(content) != stated:
            raise UserError(f"{path}: damaged, its checksum is wrong; copy or download it again")
    message_class, decode_error = _checkpoint_message()
    try:
        values = message_class.FromString(content).value
    except decode_error as error:
        raise UserError(
            f"{path}: not a MindSpore checkpoint, or truncated, damaged or encrypted; save it again with "
            "mindspore.save_checkpoint and no key"
        ) from error
    parts: dict[str, list[Any]] = {}
    for value in values:
        if not value.HasField("tensor"):
            raise UserError(f"{path}: {value.tag} is no tensor; only networks of plain tensors can be read")
        parts.setdefault(value.tag, []).append(value.tensor)
    return {tag: _tensor(path, tag, chunks) for tag, chunks in parts.items() if chunks[0].tensor_type != "str"}


def write(path: StrPath, state_dict: StateDict) -> None:
    """Write a MindSpore checkpoint from tensors under torch's names; MindSpore has no batch counters."""
    message_class, _ = _checkpoint_message()
    with open(path, "wb") as file:
        for name, tensor in state_dict.items():
            if name.endswith(".num_batches_tracked"):
                continue
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            for start in range(0, len(content), CHUNK_BYTES):
                message = message_class()
                value = message.value.add(tag=_mindspore_name(name, state_dict))
                value.tensor.dims.extend(tensor.shape)
                value.tensor.tensor_type = _TYPE_NAMES[tensor.dtype]
                value.tensor.tensor_content = content[start : start + CHUNK_BYTES]
                file.write(message.SerializeToString())


def _tensor(path: StrPath, tag: str, chunks: list[Any]) -> torch.Tensor:
    """One tensor from its TensorProtos."""
    kind, shape = chunks[0].tensor_type, [] if list(chunks[0].dims) == [0] else list(chunks[0].dims)
    if kind not in _TYPES:
        raise UserError(f"{path}: {tag} is of type {kind}, known are {', '.join(_TYPES)}")
    tensor = torch.frombuffer(bytearray(b"".join(chunk.tensor_content for chunk in chunks)), dtype=_TYPES[kind])
    if tensor.numel() != torch.Size(shape).numel():
        raise UserError(f"{path}: damaged, {tag} has {tensor.numel()} values where its shape is {shape}")
    return tensor.reshape(shape)


def _torch_name(tag: str) -> str:
    layer, _, last = tag.rpartition(".")
    return f"{layer}.{_NORM_NAMES.get(last, last)}"


def _mindspore_name(name: str, state_dict: StateDict) -> str:
    layer, _, last = name.rpartition(".")
    if f"{layer}.running_mean" not in state_dict:  # no batch norm
        return name
    return f"{layer}." + next(mindspore for mindspore, ours in _NORM_NAMES.items() if ours == last)


@functools.cache
def _checkpoint_message() -> tuple[Any, type[Exception]]:
    """(class of message Checkpoint in the schema above, protobuf's DecodeError)."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
    except ImportError as error:
        raise UserError("MindSpore checkpoints need the protobuf package; pip install protobuf") from error
    field = descriptor_pb2.FieldDescriptorProto
    schema: dict[str, list[tuple[str, Any, Any, str | None]]] = {
        "TensorProto": [
            ("dims", field.TYPE_INT64, field.LABEL_REPEATED, None),
            ("tensor_type", field.TYPE_STRING, field.LABEL_REQUIRED, None),
            ("tensor_content", field.TYPE_BYTES, field.LABEL_REQUIRED, None),
        ],
        "Value": [
            ("tag", field.TYPE_STRING, field.LABEL_REQUIRED, None),
            ("tensor", field.TYPE_MESSAGE, field.LABEL_OPTIONAL, ".TensorProto"),
        ],
        "Checkpoint": [("value", field.TYPE_MESSAGE, field.LABEL_REPEATED, ".Value")],
    }
    proto = descriptor_pb2.FileDescriptorProto(name="mindspore_checkpoint.proto", syntax="proto2")
    for name, fields in schema.items():
        descriptor = proto.message_type.add(name=name)
        for number, (field_name, kind, label, type_name) in enumerate(fields, start=1):
            descriptor.field.add(name=field_name, number=number, type=kind, label=label, type_name=type_name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Checkpoint")), message.DecodeError
