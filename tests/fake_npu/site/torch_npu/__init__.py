"""A stand-in for torch_npu on machines without an NPU: device `npu` whose tensors lie in ordinary memory.

It has what this project calls, and refuses what the real device refuses. tests/fake_npu/conftest.py puts it on
PYTHONPATH together with package metadata of the installed torch's version, so that programs run on it unchanged.

Environment:
  FAKE_NPU_FAULT: how `import torch_npu` fails: a key of _faults.FAULTS.
  FAKE_NPU_CARDS: number of cards, default 2.
  FAKE_NPU_CHIP: name of the chip, default Ascend910B3; bf16 needs a 910B or later.
  FAKE_NPU_LOG: file that gets one line for each call worth testing.
"""

import os

_autoload_before = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as the real one does, and leaves so when it fails

from torch_npu import _faults

_faults.fail_as_asked()

import torch

from torch_npu import _aliasing, npu

__version__ = torch.__version__.partition("+")[0]

_aliasing.install(npu)

from torch_npu import _hccl
from torch_npu import optim as optim

_hccl.install()


def _autoload():
    """Called by `import torch` through the entry point."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload_before
