"""Prints as JSON the results of --device npu, auto and cpu for each way in which `import torch_npu` can fail."""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from common.device import device
from common.errors import UserError


def chosen(kind):
    """The kind of device that device.choose returns, or its error message."""
    try:
        return device.choose(kind).kind
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    answers = {}
    for fault in sys.argv[1:]:
        os.environ["FAKE_NPU_FAULT"] = fault
        answers[fault] = [chosen("npu"), chosen("auto"), chosen("cpu")]
    print(json.dumps(answers))
