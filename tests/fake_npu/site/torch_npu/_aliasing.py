"""Device npu through PyTorch's PrivateUse1 key: tensors alias CPU memory, every operator runs on the CPU.

An npu tensor is made from the DLPack capsule of a CPU tensor by changing its device code, and back likewise. One boxed
kernel unwraps its arguments, runs the CPU operator and wraps the results. It rejects what an NPU rejects: operands on
two devices, float64, use after a fork, serialization of device tensors.
"""

import ctypes
import functools

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_DL_CPU, _DL_EXTENSION = 1, 12
_keep = []  # torch.library registrations live as long as their objects
# Copies between host and device, and indexing, whose indices may be on the host.
_MAY_MIX = {
    "aten::_copy_from",
    "aten::_copy_from_and_resize",
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put_",
    "aten::_index_put_impl_",
}
# Operators that PyTorch composes of others; the kernel would run them as a whole and miss their parts.
_COMPOSED = {
    "_to_copy",
    "copy",
    "_pin_memory",
    "is_pinned",
    "to",
    "_copy_from",
    "empty",
    "new_empty",
    "convolution",
    "_convolution",
    "convolution_backward",
    "_batch_norm_impl_index",
}
# fp16 products accumulated in float32, as in a matrix unit; the CPU's fp16 kernels take minutes.
_WIDE_SUMS = {
    "aten::convolution_overrideable",
    "aten::convolution_backward_overrideable",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
}
_LOW_PRECISION = ("conv2d", "linear", "addmm", "mm", "bmm", "matmul")


class _DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", _DLDevice)]  # the head is enough


_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_capsule.restype, _capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _relabel(tensor, code, index):
    capsule = torch._C._to_dlpack(tensor.detach() if tensor.requires_grad else tensor)
    device = ctypes.cast(_capsule(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents.device
    device.device_type, device.device_id = code, index
    with torch.inference_mode(False):  # a view of a parameter is an ordinary tensor in inference mode too
        return torch._C._from_dlpack(capsule)


def to_cpu(tensor):
    """The CPU tensor that shares an npu tensor's memory."""
    return _relabel(tensor, _DL_CPU, 0)


def to_npu(tensor, index):
    """An npu tensor that shares a CPU tensor's memory."""
    if tensor.dtype == torch.float64:
        raise RuntimeError("npu: float64 (DT_DOUBLE) is not supported by this operator")
    return _relabel(tensor, _DL_EXTENSION, index)


def _kernel(module, op, *args, **kwargs):
    """The boxed kernel of every operator."""
    name, originals, used, host = op._schema.name, {}, set(), []
    keep = []

    def unwrap(value):
        if isinstance(value, torch.Tensor):
            if value.device.type == "npu":
                used.add(value.device.index)
                alias = to_cpu(value)
                originals[id(alias)] = value
                keep.append(alias)
                return alias
            if value.dim():
                host.append(value)
        elif isinstance(value, torch.device) and value.type == "npu":
            used.add(module.current_device() if value.index is None else value.index)
            return torch.device("cpu")
        return value

    module._lazy_init()
    args, kwargs = pytree.tree_map(unwrap, (args, kwargs))
    if (originals and host and name not in _MAY_MIX) or len(used) > 1:
        places = sorted({f"npu:{index}" for index in used} | {str(tensor.device) for tensor in host})
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(places)}! "
            f"(when running {name})"
        )
    index = used.pop() if used else module.current_device()
    module._check_index(index)
    if name in ("aten::_copy_from", "aten::_copy_from_and_resize"):
        args[1].copy_(args[0])
        return originals.get(id(args[1]), args[1])
    if name in _WIDE_SUMS and torch.float16 in {t.dtype for t in args if isinstance(t, torch.Tensor)}:
        args = pytree.tree_map(lambda v: v.float() if isinstance(v, torch.Tensor) else v, args)
        result = pytree.tree_map(_half, _cpu_operator(op, name)(*args, **kwargs))
    else:
        result = _cpu_operator(op, name)(*args, **kwargs)

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        return originals[id(value)] if id(value) in originals else to_npu(value, index)

    return pytree.tree_map(wrap, result)


def _half(value):
    return value.half() if isinstance(value, torch.Tensor) else value


def _cpu_operator(op, name):
    if name == "aten::convolution_overrideable":
        return torch.ops.aten.convolution.default
    if name == "aten::convolution_backward_overrideable":
        return _convolution_backward
    return op


def _convolution_backward(grad, images, weight, stride, padding, dilation, transposed, output_padding, groups, mask):
    bias_sizes = [weight.shape[0]] if mask[2] else None
    return torch.ops.aten.convolution_backward.default(
        grad, images, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask
    )


def _autocast_kernel(op, low):
    """Casts floating npu operands to the autocast type or to float32, then runs the operator."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            dtype = torch.get_autocast_dtype("npu") if low else torch.float32

            def cast(value):
                ours = isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type == "npu"
                return value.to(dtype) if ours else value

            return op(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))

    return kernel


def _direct_operators():
    """(name, operator) of operators that need a kernel of their own, because the default resizes a CPU result."""
    for full in torch._C._dispatch_get_all_op_names():
        if not full.startswith("aten::"):
            continue
        name, _, overload = full[len("aten::") :].partition(".")
        try:
            op = getattr(getattr(torch.ops.aten, name), overload or "default")
        except (AttributeError, RuntimeError):
            continue

        def has(key, full=full):
            return torch._C._dispatch_has_kernel_for_dispatch_key(full, key)

        functional = name not in _COMPOSED and all(argument.alias_info is None for argument in op._schema.arguments)
        if has("CompositeExplicitAutogradNonFunctional") or (has("CompositeExplicitAutograd") and functional):
            yield full[len("aten::") :], op


def _refuse_to_serialize(tensor, protocol):
    if tensor.device.type == "npu":
        raise RuntimeError("npu: this tensor may have a private format that only this device reads; save a CPU copy")
    return _tensor_reduce(tensor, protocol)


_tensor_reduce, _tensor_deepcopy = torch.Tensor.__reduce_ex__, torch.Tensor.__deepcopy__


def _deepcopy(tensor, memo):
    """PyTorch's copies the storage, for which this device would need an allocator in C++."""
    if tensor.device.type != "npu":
        return _tensor_deepcopy(tensor, memo)
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


def install(module):
    """Register device npu with `module` as torch.npu; cannot be undone in a process."""
    _setup_privateuseone_for_python_backend("npu", backend_module=module)
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    kernel = functools.partial(_kernel, module)
    everything.fallback(kernel, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    convolutions = ("convolution_overrideable", "convolution_backward_overrideable")
    for name in convolutions:
        aten.impl(name, functools.partial(kernel, getattr(torch.ops.aten, name).default), "PrivateUse1")
    for name, op in _direct_operators():
        if name not in convolutions:
            aten.impl(name, functools.partial(kernel, op), "PrivateUse1")
    for name in _LOW_PRECISION:
        aten.impl(name, _autocast_kernel(getattr(torch.ops.aten, name).default, low=True), "AutocastPrivateUse1")
    aten.impl(
        "cross_entropy_loss",
        _autocast_kernel(torch.ops.aten.cross_entropy_loss.default, low=False),
        "AutocastPrivateUse1",
    )
    _keep.extend((everything, aten))
    torch.Tensor.__reduce_ex__, torch.Tensor.__deepcopy__ = _refuse_to_serialize, _deepcopy
    # PyTorch's guard for Python devices knows one index; backward in the calling thread needs no queue per index.
    torch.autograd.set_multithreading_enabled(False)
