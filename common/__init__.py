"""What two or more models of the zoo share. Nothing in here names a model."""

import os

# torch imports every installed device backend by itself, and torch_npu without CANN then breaks `import torch`.
# common/device.py imports torch_npu when an npu is asked for, and can say what is missing.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

# OpenMP's threads wait for each other in a busy loop. Where a loader process, or anybody else, needs one of their
# cores, that makes a training step on a CPU two to ten times as long. Asleep at once, they cost it 6 % on a machine of
# its own; GNU's OpenMP therefore lets them look 3,000 times first (80 us where this was measured). Read when torch is
# imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# A training step on a CPU walks through gigabytes of activations; in pages of 2 MiB the processor finds them 3 to 4 %
# faster than in pages of 4 KiB. Linux only; read when torch allocates for the first time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
