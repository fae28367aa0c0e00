"""Environment variables that torch reads once, when it is imported or allocates for the first time."""

import os


def set_torch_defaults() -> None:
    """Set them for this process and its children; a value that the user has set stays. Call before importing torch."""
    # torch imports every installed device backend by itself, and torch_npu without CANN then breaks `import torch`.
    # common/device/device.py imports torch_npu when an npu is asked for, and can say what is missing.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # OpenMP's threads wait for each other in a busy loop. Where another process needs one of their cores, that makes a
    # training step on a CPU 2 to 10 times as long. Threads that sleep at once cost a step 6 % on an idle machine; GNU's
    # OpenMP therefore polls 3,000 times (80 us on the machine of docs/benchmarks.md) before it sleeps.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Transparent 2 MiB pages for the gigabytes of activations of a CPU training step: 3 to 4 % faster. Linux only.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
