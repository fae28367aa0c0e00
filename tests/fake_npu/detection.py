"""Prints as JSON what --device npu and --device auto say for each way in which torch_npu can fail to load."""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from common.device import device
from common.errors import UserError


def said(kind):
    """The message of device.choose, or the kind of device it chose."""
    try:
        return device.choose(kind).kind
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    answers = {}
    for fault in sys.argv[1:]:
        os.environ["FAKE_NPU_FAULT"] = fault
        answers[fault] = [said("npu"), said("auto"), said("cpu")]
    print(json.dumps(answers))
