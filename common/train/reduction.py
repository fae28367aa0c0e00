"""What the ranks of a step reduce: batch-norm statistics, and in verification mode gradients in a fixed order.

A step is cut into micro-batches; the result must not depend on which rank computes one.
Legend: M micro-batches of a step over all ranks, P numbers of one micro-batch.
"""

from collections.abc import Sequence

import torch
from torch import nn

from common.distributed import Group

Norms = Sequence[nn.modules.batchnorm._BatchNorm]


class NormStatistics:
    """Batch-norm running statistics of a step: every micro-batch starts from the step's buffers, and the results are
    averaged over all micro-batches and ranks.

    Args:
      norms: those in training mode. The mean of equal buffers may round, so frozen ones stay out.
    """

    def __init__(self, norms: Norms) -> None:
        norms = [m for m in norms if m.track_running_stats]
        buffers = [b for m in norms for b in (m.running_mean, m.running_var)]
        self.buffers: list[torch.Tensor] = [b for b in buffers if b is not None]
        self._counters = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]

    def begin_step(self) -> None:
        """Remember the step's buffers."""
        self._start = [b.clone() for b in self.buffers]
        self._count = [c.clone() for c in self._counters]
        self._sum: list[torch.Tensor] = []

    def restore(self) -> None:
        """Put the step's buffers back, for the next micro-batch."""
        torch._foreach_copy_(self.buffers, self._start)
        torch._foreach_copy_(self._counters, self._count)

    def add(self) -> None:
        """Add the buffers that a micro-batch left to the sum."""
        if self._sum:
            torch._foreach_add_(self._sum, self.buffers)
        else:
            self._sum = [b.clone() for b in self.buffers]

    def average(self, num_local: int, group: Group) -> None:
        """Set the buffers to the mean over this rank's `num_local` micro-batches and all ranks: one flat all-reduce."""
        self.set_flat(group.all_reduce_mean_(torch.cat([s.flatten() for s in self._sum]) / num_local))

    def set_flat(self, flat: torch.Tensor) -> None:
        """Set all buffers from one vector in their order."""
        for buffer, part in zip(self.buffers, flat.split([b.numel() for b in self.buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


class FastReduction:
    """The default: DistributedDataParallel sums the gradients, only the batch-norm statistics are averaged here."""

    def __init__(self, model: nn.Module, norms: Norms, group: Group, num_micro_batches: int) -> None:
        self._norms, self._group = NormStatistics(norms), group
        self._averages = num_micro_batches > 1 and bool(self._norms.buffers)

    def loss_divisor(self, num_local: int, num_micro_batches: int) -> int:
        """What a micro-batch's loss is divided by: DDP averages over ranks, the rest is the mean within a rank."""
        return num_local

    def begin_step(self) -> None:
        if self._averages:
            self._norms.begin_step()

    def micro_batch_done(self, is_last: bool) -> None:
        if self._averages:
            self._norms.add()
            if not is_last:
                self._norms.restore()

    def end_step(self, num_local: int) -> None:
        if self._averages:
            self._norms.average(num_local, self._group)


class ExactReduction:
    """--reduce exact: gradients and batch-norm statistics are summed in the order of the micro-batches.

    A floating-point sum depends on its order; this one does not depend on the number of ranks. It costs the memory of
    M gradients on every rank: for verification, not for speed.
    """

    def __init__(self, model: nn.Module, norms: Norms, group: Group, num_micro_batches: int) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._norms, self._group = NormStatistics(norms), group

    def loss_divisor(self, num_local: int, num_micro_batches: int) -> int:
        return num_micro_batches

    def begin_step(self) -> None:
        self._norms.begin_step()
        self._parts: list[list[torch.Tensor]] = []

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def micro_batch_done(self, is_last: bool) -> None:
        self._parts.append([*self._gradients(), *(buffer.clone() for buffer in self._norms.buffers)])
        if not is_last:
            for p in self._parameters:
                p.grad = None
            self._norms.restore()

    def end_step(self, num_local: int) -> None:
        (total, *others), gradients = self._parts, self._gradients()
        num_parts = num_local * self._group.world.size
        if self._group.world.size > 1:
            flat_MP = torch.stack([torch.cat([t.flatten() for t in part]) for part in self._parts])
            total_P, *others_P = self._group.all_gather(flat_MP).flatten(0, 1)
            for part_P in others_P:
                total_P += part_P
            parts = total_P.split([t.numel() for t in total])
            total = [part.view(t.shape) for part, t in zip(parts, total, strict=True)]
        else:  # the same sums without copies
            for other in others:
                torch._foreach_add_(total, other)
        torch._foreach_copy_(gradients, total[: len(gradients)])
        if self._norms.buffers:
            self._norms.set_flat(torch.cat([t.flatten() for t in total[len(gradients) :]]) / num_parts)
        self._parts = []


REDUCTIONS: dict[str, type[FastReduction] | type[ExactReduction]] = {"fast": FastReduction, "exact": ExactReduction}
