"""Stands in for the compiled half of ais_bench: runs what the fake atc wrote with ONNX Runtime, in its words and codes.

Like the real module it checks byte counts only. FAKE_ACL_DEVICES is the number of devices that exist (default 8).
"""

import enum
import json
import os
import pathlib
import types

import numpy as np

dtype = enum.IntEnum("dtype", {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "uint8": 4})
KINDS = {"tensor(float)": dtype.float32, "tensor(float16)": dtype.float16, "tensor(uint8)": dtype.uint8}


def log(text, level="INFO"):
    print(f"[{level}] {text}", flush=True)


def refuse(code, text):
    """A failed call: the reason as a printed line, its code as a RuntimeError."""
    log(text, "ERROR")
    meaning = {1: "ACL: invalid parameter", -1: "ACL: general failure"}.get(code, "Error code unknown")
    raise RuntimeError(f"[{code}][{meaning}] ")


class InferenceSession:
    """An OM file on a device.

    Attributes:
      gears: its batch sizes, empty for a fixed one.
    """

    def __init__(self, model_path, device_id):
        import onnxruntime  # late: the front ends import this module to print their help

        log("acl init success")
        if device_id >= int(os.environ.get("FAKE_ACL_DEVICES", 8)):
            refuse(107001, f"acl open device {device_id} failed")
        log(f"open device {device_id} success")
        try:
            model = json.loads(pathlib.Path(model_path).read_text())
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._net = onnxruntime.InferenceSession(model["onnx"], options, providers=["CPUExecutionProvider"])
        except (ValueError, KeyError):
            refuse(1, f"load model from file failed, model file is {model_path}")
        log(f"load model {model_path} success")
        log("create model description success")
        self._aipp, self.gears = model.get("aipp"), model.get("gears", [])
        node = self._net.get_inputs()[0]
        _, channels, height, width = node.shape
        self._shape = (height, width, channels) if self._aipp else (channels, height, width)
        self._dtype = dtype.uint8 if self._aipp else KINDS[node.type]
        self.sample_bytes = int(np.prod(self._shape)) * np.dtype(self._dtype.name).itemsize
        self.batch = None if self.gears else model["batch"]
        size = self.sample_bytes * (self.batch or max(self.gears))
        shape = [self.batch or -1, *self._shape]
        self._input = types.SimpleNamespace(name=node.name, datatype=self._dtype, shape=shape, size=size, realsize=size)

    def get_inputs(self):
        return [self._input]

    def get_outputs(self):
        columns = self._net.get_outputs()[0].shape[-1]
        return [types.SimpleNamespace(shape=[self.batch or max(self.gears), columns])]

    def set_dynamic_batchsize(self, batch):
        if batch not in self.gears:
            refuse(
                1,
                "the dymBatch parameter is not correct"
                if self.gears
                else "the dynamic_batch_size parameter is not specified for model conversion",
            )
        self.batch = batch
        self._input.realsize = self.sample_bytes * batch

    def run(self, data):
        """Bytes of one batch -> logits."""
        if not self.batch or data.nbytes != self._input.realsize:
            refuse(-1, f"Check i:0 name:{self._input.name} in size:{data.nbytes} needsize:{self._input.realsize}")
        images = data.view(self._dtype.name).reshape(self.batch, *self._shape)
        if self._aipp:
            low, factor = (np.array(self._aipp[key], np.float16) for key in ("min", "var"))
            pixels = (images.astype(np.float16) - low) * factor
            images = np.ascontiguousarray(pixels.astype(np.float32).transpose(0, 3, 1, 2))
        return self._net.run(None, {self._input.name: images})[0]


class InferSession:
    """The Python session of all front ends, as far as it is used here."""

    def __init__(self, device_id, model_path, acl_json_path=None, debug=False, loop=1):
        self.session = InferenceSession(model_path, device_id)

    def get_inputs(self):
        return self.session.get_inputs()

    def get_outputs(self):
        return self.session.get_outputs()

    def infer(self, feeds, mode="static", custom_sizes=100000):
        """A strided array gives whatever lies at its address, as on the device."""
        array = feeds[0]
        if array.base is not None and not array.flags.c_contiguous:
            array = array.base
        return [self.session.run(np.frombuffer(np.ascontiguousarray(array), np.uint8))]
