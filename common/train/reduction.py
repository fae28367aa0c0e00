"""What the ranks of a step do together: average batch-norm statistics, and sum gradients in a fixed order.

A step is cut into micro-batches; which rank computes one must not show in the result. Legend: M micro-batches of a
step over all ranks, P numbers of one micro-batch.
"""

import torch


class NormStatistics:
    """Batch-norm running statistics of a step: every micro-batch starts from the step's buffers, and the results are
    averaged over all micro-batches and ranks."""

    def __init__(self, model):
        norms = [
            m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.track_running_stats
        ]
        self.buffers = [b for m in norms for b in (m.running_mean, m.running_var)]
        self._counters = [m.num_batches_tracked for m in norms]

    def begin_step(self):
        """Remember the step's buffers."""
        self._start = [b.clone() for b in self.buffers]
        self._count = [c.clone() for c in self._counters]
        self._sum = None

    def restore(self):
        """Put the step's buffers back, for the next micro-batch."""
        torch._foreach_copy_(self.buffers, self._start)
        torch._foreach_copy_(self._counters, self._count)

    def add(self):
        """Add the buffers that a micro-batch left behind to the sum."""
        if self._sum is None:
            self._sum = [b.clone() for b in self.buffers]
        else:
            torch._foreach_add_(self._sum, self.buffers)

    def average(self, share, group):
        """Set the buffers to the mean over this rank's `share` micro-batches and all ranks: one flat all-reduce."""
        self.set_flat(group.all_reduce_mean_(torch.cat([s.flatten() for s in self._sum]) / share))

    def set_flat(self, flat):
        """Set all buffers from one vector in their order."""
        for buffer, part in zip(self.buffers, flat.split([b.numel() for b in self.buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


class FastReduction:
    """The default: DistributedDataParallel sums the gradients, here only the batch-norm statistics are averaged."""

    def __init__(self, model, group, num_micro_batches):
        self._norms, self._group = NormStatistics(model), group
        self._averages = num_micro_batches > 1 and bool(self._norms.buffers)

    def loss_divisor(self, share, num_micro_batches):
        """What a micro-batch's loss is divided by: DDP averages over ranks, the rest is the mean within a rank."""
        return share

    def begin_step(self):
        if self._averages:
            self._norms.begin_step()

    def micro_batch_done(self, is_last):
        if self._averages:
            self._norms.add()
            if not is_last:
                self._norms.restore()

    def end_step(self, share):
        if self._averages:
            self._norms.average(share, self._group)


class ExactReduction:
    """--reduce exact: gradients and batch-norm statistics are summed in the order of the micro-batches.

    A floating-point sum depends on its order; this one does not depend on the number of ranks. It costs the memory of
    M gradients on every rank: for verification, not for speed.
    """

    def __init__(self, model, group, num_micro_batches):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._norms, self._group = NormStatistics(model), group

    def loss_divisor(self, share, num_micro_batches):
        return num_micro_batches

    def begin_step(self):
        self._norms.begin_step()
        self._parts = []

    def micro_batch_done(self, is_last):
        tensors = [p.grad for p in self._parameters] + self._norms.buffers
        self._parts.append(torch.cat([t.detach().flatten() for t in tensors]))
        if not is_last:
            for p in self._parameters:
                p.grad = None
            self._norms.restore()

    def end_step(self, share):
        parts_MP = self._group.all_gather(torch.stack(self._parts)).flatten(0, 1)
        total_P = parts_MP[0].clone()
        for part_P in parts_MP[1:]:
            total_P += part_P
        sizes = [p.numel() for p in self._parameters]
        grads, buffers = total_P.split([sum(sizes), len(total_P) - sum(sizes)])
        for p, part in zip(self._parameters, grads.split(sizes), strict=True):
            p.grad.copy_(part.view_as(p))
        self._norms.set_flat(buffers / len(parts_MP))


REDUCTIONS = {"fast": FastReduction, "exact": ExactReduction}
