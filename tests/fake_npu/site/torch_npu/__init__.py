"""A fake torch_npu for machines without an NPU: device `npu` with tensors in CPU memory.

It defines what this project calls, and rejects what the real device rejects. tests/fake_npu/conftest.py puts it on
PYTHONPATH with package metadata of the installed torch's version, so that programs use it unchanged.

Environment:
  FAKE_NPU_FAULT: how `import torch_npu` fails: a key of _faults.FAULTS.
  FAKE_NPU_CARDS: number of cards, default 2.
  FAKE_NPU_CHIP: name of the chip, default Ascend910B3; bf16 needs a 910B or later.
  FAKE_NPU_TORCHAIR: what is wrong with torchair: absent, broken or refuses.
  FAKE_NPU_LOG: file to which the calls that tests check are appended, one per line.
"""

import os

_autoload_before = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as in torch_npu, which does not reset it if the import fails

from torch_npu import _faults

_faults.fail_as_asked()

import torch

from torch_npu import _aliasing, npu
from torch_npu import dynamo as dynamo

__version__ = torch.__version__.partition("+")[0]

_aliasing.install(npu)

from torch_npu import _hccl
from torch_npu import optim as optim

_hccl.install()


def _autoload():
    """Called by `import torch` through the entry point."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload_before
