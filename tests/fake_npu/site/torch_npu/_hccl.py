"""Process-group backend hccl: gloo on the CPU memory of npu tensors, with HCCL's restrictions."""

import os

import torch.distributed as dist

from torch_npu import _aliasing, npu
from torch_npu._calls import note


class _Hccl(dist.ProcessGroup):
    """Delegates to gloo; accepts only npu tensors of the process's card."""

    def __init__(self, rank, size, inner):
        super().__init__(rank, size)
        self._inner, self._rank, self._size = inner, rank, size

    def getBackendName(self):  # noqa: N802  PyTorch's name
        return "hccl"

    def rank(self):
        return self._rank

    def size(self):
        return self._size

    def allreduce(self, tensors, options=None):
        return self._inner.allreduce(_host(tensors), options or dist.AllreduceOptions())

    def broadcast(self, tensors, options=None):
        return self._inner.broadcast(_host(tensors), options or dist.BroadcastOptions())

    def allgather(self, outputs, inputs, options=None):
        outputs = [_host(tensors) for tensors in outputs]
        return self._inner.allgather(outputs, _host(inputs), options or dist.AllgatherOptions())

    def _allgather_base(self, output, input, options=None):
        (output,), (input,) = _host([output]), _host([input])
        return self._inner._allgather_base(output, input, options or dist.AllgatherOptions())

    def barrier(self, options=None):
        return self._inner.barrier(options or dist.BarrierOptions())


def _host(tensors):
    for tensor in tensors:
        if str(tensor.device) != f"npu:{npu.current_device()}":
            raise RuntimeError(f"HCCL: a tensor on {tensor.device}, this process uses npu:{npu.current_device()}")
    return [_aliasing.to_cpu(tensor) for tensor in tensors]


def _create(store, rank, size, timeout):
    npu._lazy_init()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if npu.current_device() != local_rank:
        raise RuntimeError(f"HCCL: local rank {local_rank} uses npu:{npu.current_device()}; set_device comes first")
    note("hccl", f"rank={rank}", f"size={size}", f"npu:{npu.current_device()}")
    return _Hccl(rank, size, dist.ProcessGroupGloo(store, rank, size, timeout))


def install():
    """Register the backend."""
    dist.Backend.register_backend("hccl", _create, devices=["npu"])
