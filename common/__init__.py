"""What two or more models of the zoo share. Nothing in here names a model."""
import os

# torch imports every installed device backend by itself, and torch_npu without CANN then breaks `import torch`.
# common/device.py imports torch_npu when an npu is asked for, and can say what is missing.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

# OpenMP's threads wait for each other in a busy loop. Where a loader process, or anybody else, needs one of their
# cores, that slows a training step on a CPU by a factor of ten and more. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
