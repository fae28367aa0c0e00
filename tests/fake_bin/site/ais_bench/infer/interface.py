"""InferSession over the JSON that the fake atc wrote, computed by ONNX Runtime; checks byte counts only, as the real."""

import json
import pathlib
import re
import types

import numpy as np
import onnxruntime


class InferSession:
    """The part of ais_bench's Python interface that is used here."""

    def __init__(self, device_id, model_path, acl_json_path=None, debug=False, loop=1):
        self.model = json.loads(pathlib.Path(model_path).read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.model["onnx"], options, providers=["CPUExecutionProvider"])
        batch, channels, height, width = self.model["shape"]
        if batch == -1:
            batch = max(map(int, self.model["gears"].split(",")))
        self.shape = [batch, height, width, channels] if self.model["aipp"] else [batch, channels, height, width]
        self.itemsize = 1 if self.model["aipp"] else 4
        self.sample_bytes = channels * height * width * self.itemsize

    def get_inputs(self):
        return [
            types.SimpleNamespace(
                name=self.model["name"],
                shape=self.shape,
                size=self.shape[0] * self.sample_bytes,
                realsize=self.shape[0] * self.sample_bytes,
            )
        ]

    def get_outputs(self):
        return [types.SimpleNamespace(shape=[self.shape[0], self.session.get_outputs()[0].shape[-1]])]

    def infer(self, feeds, mode="static", custom_sizes=100000):
        """Raw bytes in, logits out: a strided array gives whatever lies at its address, as on the device."""
        data = np.frombuffer(
            feeds[0].base
            if feeds[0].base is not None and not feeds[0].flags.c_contiguous
            else np.ascontiguousarray(feeds[0]),
            np.uint8,
        ).reshape(-1)
        return [self.logits(data)]

    def logits(self, data):
        """Bytes of whole samples -> logits."""
        if not self.model["aipp"]:
            return self._run(data.view(np.float32).reshape(-1, *self.shape[1:]))
        found = dict(re.findall(r"(\w+)\s*:\s*(\S+)", self.model["aipp"]))
        pixels = data.reshape(-1, *self.shape[1:]).astype(np.float16)
        for i in range(3):
            pixels[..., i] = (pixels[..., i] - np.float16(found[f"min_chn_{i}"])) * np.float16(
                found[f"var_reci_chn_{i}"]
            )
        return self._run(np.ascontiguousarray(pixels.astype(np.float32).transpose(0, 3, 1, 2)))

    def _run(self, images):
        return self.session.run(None, {self.model["name"]: images})[0]
