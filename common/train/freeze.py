"""--freeze: the modules of a network whose weights and batch-norm statistics a training keeps."""

from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.spec import BuildOptions, ModelSpec

HEAD = "head"  # --freeze head; none and the names of blocks are the other values


def frozen_names(model: nn.Module, spec: ModelSpec, freeze: str) -> list[str]:
    """Names of the modules that --freeze keeps.

    A block is a child of the network, or one layer of a child that is an nn.Sequential. Networks register their
    modules in the order of the forward pass, so the modules before a block are those that it is computed from.

    Raises:
      UserError: the network has no such block.
    """
    names = [name for name, _ in model.named_modules() if name]
    if freeze == "none":
        return []
    if freeze == HEAD:
        head = spec.classifiers[0]
        return [name for name in names if not f"{name}.".startswith(f"{head}.") and not head.startswith(f"{name}.")]
    blocks = [
        name
        for child, module in model.named_children()
        for name in ([f"{child}.{i}" for i in range(len(module))] if isinstance(module, nn.Sequential) else [child])
        if any(True for _ in model.get_submodule(name).parameters())
    ]
    if freeze not in blocks:
        raise UserError(f"--freeze: {freeze}, must be none, {HEAD} or a block of {spec.name}: {', '.join(blocks)}")
    return [name for name in names[: names.index(freeze)] if not freeze.startswith(f"{name}.")]


def adapt_build_options(spec: ModelSpec, options: BuildOptions, freeze: str) -> tuple[dict[str, Any], str]:
    """(build options, one line on what is frozen) of a training with --freeze.

    The auxiliary head is left out where everything that it could train is frozen.

    Raises:
      UserError: the network has no such block.
    """
    with torch.device("meta"):
        frozen = set(frozen_names(spec.build(**options), spec, freeze))
        options = {**options, "aux": False} if frozen.intersection(spec.training_modules) else dict(options)
        model = spec.build(**options)
    sizes = {name: sum(p.numel() for p in module.parameters(False)) for name, module in model.named_modules()}
    kept = sum(size for name, size in sizes.items() if name in frozen)
    return options, f"--freeze: {freeze} keeps {kept:,} of {sum(sizes.values()):,} parameters and their batch norms"


class Freeze:
    """The frozen part of a network, and which batch norms keep their statistics.

    Attributes:
      norms: batch norms whose running statistics are trained.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, freeze: str, freeze_norm: bool) -> None:
        modules = dict(model.named_modules())
        self._kept = [modules[name] for name in frozen_names(model, spec, freeze)]
        for module in self._kept:
            module.requires_grad_(False)
        norms = [m for m in modules.values() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if freeze_norm:
            self._kept += norms
        kept = set(map(id, self._kept))
        self.norms = [norm for norm in norms if id(norm) not in kept]

    def train(self, network: nn.Module) -> None:
        """Training mode for `network`, which may wrap the model; evaluation mode for what is kept."""
        network.train()
        for module in self._kept:
            module.eval()
