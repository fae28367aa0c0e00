"""What two or more models of the zoo share. Nothing in here names a model."""

import os

# torch imports every installed device backend by itself, and torch_npu without CANN then breaks `import torch`.
# common/device.py imports torch_npu when an npu is asked for, and can say what is missing.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
