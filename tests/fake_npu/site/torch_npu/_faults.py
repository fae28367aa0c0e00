"""Exceptions of importing torch_npu 2.12 with something missing; types and messages are the real ones."""

import os

FAULTS = {
    "cann": (ImportError, "libhccl.so: cannot open shared object file: No such file or directory"),
    "driver": (ImportError, "libascend_hal.so: cannot open shared object file: No such file or directory"),
    "symbol": (ImportError, "/site/torch_npu/lib/libtorch_npu.so: undefined symbol: _ZN2at4_ops9fused_sgdE"),
    "opp": (
        Exception,
        "ASCEND_OPP_PATH environment variable is not set. Please check whether the opp package has been installed. "
        "If exist, please run 'source set_env.sh' in the CANN installation path.",
    ),
    "cuda": (
        RuntimeError,
        "Two accelerators cannot be used at the same time in PyTorch: npu and cuda. You can install the cpu version of "
        "PyTorch to use your npu device, or use the cuda device with 'export TORCH_DEVICE_BACKEND_AUTOLOAD=0'.\n"
        "[ERROR] 2026-01-01-00:00:00 (PID:1, Device:-1, RankID:-1) ERR00007 PTA feature not supported",
    ),
}


def fail_as_asked():
    fault = os.environ.get("FAKE_NPU_FAULT")
    if fault:
        kind, text = FAULTS[fault]
        raise kind(text)
