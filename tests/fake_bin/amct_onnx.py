"""Stands in for AMCT's amct_onnx: `calibration` checks its options and data, and writes the three files of the real one.

The simulation model rounds the classifier's weights to FAKE_AMCT_BITS bits (8). FAKE_AMCT_STATUS makes it fail.
"""

import json
import os
import pathlib
import sys

import numpy as np
import onnx
from onnx import helper, numpy_helper

KNOWN = set("model save_path input_shape data_dir data_types evaluator calibration_config batch_num".split())


def main(command, *arguments):
    assert command == "calibration", command
    options = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
    assert set(options) <= KNOWN, options
    if status := os.environ.get("FAKE_AMCT_STATUS"):
        print("[AMCT][ERROR] something is wrong")
        sys.exit(int(status))
    name, _, shape = options["input_shape"].rpartition(":")
    size = 4 * int(np.prod([int(side) for side in shape.split(",")]))
    found = sorted(pathlib.Path(options["data_dir"]).iterdir())
    assert options["data_types"] == "float32" and len(found) >= int(options["batch_num"])
    assert all(path.stat().st_size == size for path in found), f"a file is not of {size} bytes"
    proto = onnx.load(options["model"])
    assert name == proto.graph.input[0].name
    del proto.metadata_props[:]
    steps = 2 ** (int(os.environ.get("FAKE_AMCT_BITS", 8)) - 1)
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 2:
            scale = np.abs(values).max() / steps
            tensor.CopyFrom(numpy_helper.from_array((np.rint(values / scale) * scale).astype(np.float32), tensor.name))
    onnx.save(proto, options["save_path"] + "_fake_quant_model.onnx")
    quant = helper.make_node("AscendQuant", [name], ["quantized"], "quant")
    proto.graph.node.insert(0, quant)
    onnx.save(proto, options["save_path"] + "_deploy_model.onnx")
    pathlib.Path(options["save_path"] + "_quant.json").write_text(json.dumps({}))


if __name__ == "__main__":
    main(*sys.argv[1:])
