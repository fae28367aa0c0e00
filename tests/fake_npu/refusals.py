"""Prints as JSON how the fake NPU responds to operations that an NPU rejects."""

import json
import os

import torch
import torch_npu  # noqa: F401


def answer(action):
    """The error that an action raises, in one line, or "done"."""
    try:
        action()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "done"


def in_a_fork(action):
    """The response in a forked child."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, answer(action).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        return file.read()


def host_work():
    torch.manual_seed(1)  # seeds the generators of all devices, in a dataloader worker too
    torch.rand(2).sum()


torch.npu.set_device(1)
ours, host = torch.ones(2, 3, device="npu:1"), torch.ones(2, 3)
sgd = torch_npu.optim.NpuFusedSGD([torch.nn.Parameter(ours.clone())], lr=0.1, momentum=0.9)
parameter = sgd.param_groups[0]["params"][0]


def step_with_a_new_gradient():
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        sgd.step()


ANSWERS = {
    "operands on two devices": answer(lambda: ours + host),
    "operands on two cards": answer(lambda: ours + torch.ones(2, 3, device="npu:0")),
    "a number of the host": answer(lambda: ours + torch.tensor(2.0)),
    "a copy from the host": answer(lambda: ours.copy_(host)),
    "float64": answer(lambda: ours.double()),
    "a float64 constant": answer(lambda: torch.zeros(1, dtype=torch.float64, device="npu:1")),
    "a card that does not exist": answer(lambda: torch.ones(1, device="npu:2")),
    "pinned memory": answer(host.pin_memory),
    "numpy": answer(ours.numpy),
    "saving": answer(lambda: torch.save(ours, os.devnull)),
    "saving a host copy": answer(lambda: torch.save(ours.cpu(), os.devnull)),
    "a gradient of None": answer(lambda: sgd.zero_grad(set_to_none=True)),
    "a replaced gradient": answer(step_with_a_new_gradient),
    "scaling on the host": answer(lambda: torch.npu.amp.GradScaler().scale(host)),
    "the device in a fork": in_a_fork(lambda: ours + 1),
    "the host in a fork": in_a_fork(host_work),
}

if __name__ == "__main__":
    print(json.dumps(ANSWERS))
