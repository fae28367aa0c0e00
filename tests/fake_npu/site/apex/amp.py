"""apex.amp: O1 (casts in functions) and O2 (fp16 weights beside float32 masters), static and dynamic loss scale.

The calls go to FAKE_NPU_LOG; one that comes too early or too late raises.
"""

import contextlib
import inspect
import os
import types

import torch
from torch.utils import _pytree as pytree
from torch_npu._calls import note

_amp = types.SimpleNamespace(level=None, scale=1.0, dynamic=False, unskipped=0, unscaled=False)


def initialize(
    models,
    optimizers=None,
    enabled=True,
    opt_level="O1",
    cast_model_type=None,
    patch_torch_functions=None,
    keep_batchnorm_fp32=None,
    master_weights=None,
    loss_scale=None,
    num_losses=1,
    verbosity=1,
    combine_grad=None,
    combine_ddp=None,
):
    model, optimizer = models, optimizers
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError("amp.initialize: called after DistributedDataParallel wrapped the network")
    if any(p.device.type == "cpu" for p in model.parameters()):
        raise RuntimeError("amp.initialize: the network is still on the CPU")
    if opt_level not in ("O1", "O2") or not (loss_scale == "dynamic" or isinstance(loss_scale, float)):
        raise RuntimeError(f"amp.initialize: opt_level {opt_level!r}, loss_scale {loss_scale!r}")
    note("apex.initialize", opt_level, f"loss_scale={loss_scale}", f"combine_grad={bool(combine_grad)}")
    _amp.level, _amp.dynamic = opt_level, loss_scale == "dynamic"
    _amp.scale = 2.0**16 if _amp.dynamic else loss_scale
    (_to_o1 if opt_level == "O1" else _to_o2)(model, optimizer)
    _watch_step(optimizer)
    return model, optimizer


if os.environ.get("FAKE_APEX") == "nvidia":
    initialize.__signature__ = inspect.Signature(
        [p for p in inspect.signature(initialize).parameters.values() if not p.name.startswith("combine")]
    )


def _to_o1(model, optimizer):
    plain, device = model.forward, next(model.parameters()).device.type

    def forward(*args, **kwargs):
        with torch.autocast(device, torch.float16):
            outputs = plain(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.float, outputs)

    model.forward = forward
    optimizer._masters = None


def _to_o2(model, optimizer):
    model.half()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.float()
    plain = model.forward

    def forward(*args, **kwargs):
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.half, (args, kwargs))
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.float, plain(*args, **kwargs))

    model.forward = forward
    model._register_state_dict_hook(
        lambda module, state, prefix, metadata: state.update(
            {k: v.float() for k, v in state.items() if v.dtype == torch.float16}
        )
    )
    optimizer._masters = ()

    def zero_grad(self):  # apex's takes no set_to_none
        for p in model.parameters():
            p.grad = None

    optimizer.zero_grad = types.MethodType(zero_grad, optimizer)


def _make_masters(optimizer):
    """Lazily, so that weights and momentum that were loaded after initialize count."""
    optimizer._masters = []
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            master = torch.nn.Parameter(p.detach().float()) if p.dtype == torch.float16 else p
            optimizer._masters.append((p, master))
            if master is not p:
                group["params"][i] = master
                state = optimizer.state.pop(p, None)
                if state:
                    optimizer.state[master] = {k: v.float() for k, v in state.items()}


def _watch_step(optimizer):
    plain = optimizer.step

    def step(*args, **kwargs):
        if not _amp.unscaled:
            raise RuntimeError("apex: step() without amp.scale_loss before it, or all of those delayed the unscaling")
        _amp.unscaled = False
        if _amp.skip:
            note("apex.skipped")
            return
        note("apex.step")
        plain(*args, **kwargs)
        with torch.no_grad():
            for p, master in optimizer._masters or ():
                if master is not p:
                    p.copy_(master)

    optimizer.step = step


@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False):
    if _amp.level is None:
        raise RuntimeError("amp.scale_loss: amp.initialize was not called")
    note("apex.scale_loss", f"delay_unscale={delay_unscale}")
    yield loss.float() * _amp.scale
    if not delay_unscale:
        _unscale(optimizers)


@torch.no_grad()
def _unscale(optimizer):
    if optimizer._masters == ():
        _make_masters(optimizer)
    pairs = optimizer._masters or [(p, p) for group in optimizer.param_groups for p in group["params"]]
    finite = True
    for p, master in pairs:
        grad = p.grad.float() / _amp.scale
        finite = finite and bool(torch.isfinite(grad).all())
        master.grad = grad
    _amp.skip, _amp.unscaled = _amp.dynamic and not finite, True
    if _amp.dynamic:
        _amp.unskipped = 0 if _amp.skip else _amp.unskipped + 1
        _amp.scale = _amp.scale / 2 if _amp.skip else _amp.scale


def master_params(optimizer):
    for group in optimizer.param_groups:
        yield from group["params"]


def state_dict(destination=None):
    note("apex.state_dict")
    return {"loss_scaler0": {"loss_scale": _amp.scale, "unskipped": _amp.unskipped}}


def load_state_dict(state_dict):
    if _amp.level is None:
        raise RuntimeError("amp.load_state_dict: amp.initialize comes first")
    note("apex.load_state_dict", state_dict["loss_scaler0"]["loss_scale"])
    _amp.scale, _amp.unskipped = state_dict["loss_scaler0"]["loss_scale"], state_dict["loss_scaler0"]["unskipped"]
