"""Speed and loss of a run, without making the device wait for the host at every step."""

import contextlib
import math
import time

import torch


class Throughput:
    """Images per second over all ranks, without the first steps of the process, evaluation and checkpoints."""

    def __init__(self, device, throughput_skip_steps, images_per_step):
        self._device, self._warm_up, self._images_per_step = device, throughput_skip_steps, images_per_step
        self._steps, self._measured, self._seconds, self._since = 0, 0, 0.0, None

    def start(self):
        """The clock runs from here."""
        self._device.synchronize()
        self._since = time.perf_counter()

    def stop(self):
        """The clock stands still from here."""
        if self._since is not None:
            self._device.synchronize()
            self._seconds += time.perf_counter() - self._since
            self._since = None

    @contextlib.contextmanager
    def paused(self):
        """Stop the clock within the block, if it runs."""
        running = self._since is not None
        self.stop()
        yield
        if running:
            self.start()

    def step(self):
        """A step was done."""
        self._steps, self._measured = self._steps + 1, self._measured + 1
        if self._steps == self._warm_up:
            with self.paused():
                self._seconds, self._measured = 0.0, 0

    @property
    def left_out(self):
        """First steps that are not in the number."""
        return self._steps - self._measured if self._measured else 0

    @property
    def images_per_s(self):
        return self._measured * self._images_per_step / self._seconds if self._measured else 0.0


class LossMeter:
    """Loss and accuracy since the last progress line; kept on the device until somebody asks."""

    def __init__(self):
        self.restart()
        self._unchecked = []

    def restart(self):
        self._losses, self._hits, self._seen, self._since, self._steps = [], [], 0, time.perf_counter(), set()
        self._in_last_step = 0

    def add(self, epoch, step, loss, outputs, labels_N):
        """Note a micro-batch: its loss, its network outputs (logits, or a tuple that begins with them), its labels."""
        logits_NK = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        self._losses.append(loss.detach())
        self._hits.append((logits_NK.detach().argmax(dim=1) == labels_N).sum())
        self._seen += len(labels_N)
        self._in_last_step = self._in_last_step + 1 if (epoch, step) in self._steps else 1
        self._steps.add((epoch, step))
        self._unchecked.append((epoch, step, self._losses[-1]))

    def first_non_finite(self):
        """(epoch, step, loss) of the first micro-batch since the last call whose loss is NaN or infinite, or None."""
        pending, self._unchecked = self._unchecked, []
        if not pending:
            return None
        values = torch.stack([loss for _, _, loss in pending]).tolist()
        return next(((e, s, v) for (e, s, _), v in zip(pending, values, strict=True) if not math.isfinite(v)), None)

    def means(self, group):
        """(mean loss, top-1 in percent, mean loss of the last step alone) over all ranks; a collective call."""
        losses = torch.stack(self._losses).cpu().double() if self._losses else torch.zeros(0)
        hits = int(torch.stack(self._hits).sum()) if self._hits else 0
        last = losses[len(losses) - self._in_last_step :]
        local = [float(losses.sum()), len(losses), hits, self._seen, float(last.sum()), len(last)]
        loss_sum, count, hits, seen, last_sum, last_count = group.all_reduce_sum(local)
        return loss_sum / max(count, 1), 100.0 * hits / max(seen, 1), last_sum / max(last_count, 1)

    def images_per_s(self, images_per_step):
        """Speed since the last restart, everything included."""
        return len(self._steps) * images_per_step / (time.perf_counter() - self._since)
