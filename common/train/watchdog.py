"""The heartbeat of a run: a rank or a loader that hangs ends it with a report, instead of keeping all others waiting.

Every rank says in which phase it is; a thread passes that on to the others through the launcher's store. A rank whose
phase does not change for --hang-timeout seconds asks who keeps it waiting, says so and leaves.
"""

import datetime
import json
import os
import threading
import time

import torch.distributed as dist

WAITING = "waiting for the other ranks"
# A beat that did not come for this many beats: the rank stands still.
_MISSED_BEATS = 4


class Watch:
    """Watches the progress of this rank.

    Args:
      world: distributed.World.
      timeout_s: how long a phase may take, seconds; 0: for ever.
      where: returns a few words on the step and the images at hand; called from the thread.
      leave: called in the thread with the report, or None where another rank gives it; ends the process.
    """

    def __init__(self, world, timeout_s, where, leave):
        self._world, self._timeout_s, self._where, self._leave = world, timeout_s, where, leave
        self._interval_s = min(max(timeout_s / 10, 0.1), 5)
        self._phase, self._changes, self._beats = "starting", 0, 0
        self._store, self._closed = None, threading.Event()
        if timeout_s:
            self._beat(0.0)  # before the first step, so that every rank was heard of
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def at(self, phase):
        """This rank makes progress, and what it does next is `phase`."""
        self._phase, self._changes = phase, self._changes + 1

    def close(self):
        """Stop watching."""
        self._closed.set()
        if self._timeout_s:
            self._thread.join()

    def _run(self):
        stalled_s, changes, before = 0.0, None, time.monotonic()
        while not self._closed.wait(self._interval_s):
            now = time.monotonic()
            # A process that was stopped and continued (Ctrl-Z, a sleeping laptop) was not hanging in between.
            stalled_s, before = stalled_s + min(now - before, 2 * self._interval_s), now
            if changes != self._changes:
                stalled_s, changes = 0.0, self._changes
            self._beat(stalled_s)
            if stalled_s >= self._timeout_s:
                self._leave(self._report(stalled_s))

    # ---- the other ranks -----------------------------------------------------------------------------------------

    def _beat(self, stalled_s):
        """Tell the others how this rank is; without the store there is nobody to tell."""
        self._beats += 1
        beat = json.dumps([self._beats, self._phase, round(stalled_s, 1), self._where()])
        self._with_store(lambda store: store.set(str(self._world.rank), beat))

    def _others(self):
        """{rank: its last beat} of the other ranks, as far as known."""

        def read(store):
            keys = [str(rank) for rank in range(self._world.size) if rank != self._world.rank]
            return {int(key): json.loads(store.get(key)) for key in keys if store.check([key])}

        return self._with_store(read) or {}

    def _with_store(self, action):
        """What `action` makes of the launcher's store; None where there is none or it does not answer."""
        if self._world.size == 1:
            return None
        try:
            if self._store is None:
                address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                limit = datetime.timedelta(seconds=10)
                store = dist.TCPStore(*address, wait_for_workers=False, timeout=limit)
                self._store = dist.PrefixStore("heartbeat", store)
            return action(self._store)
        except RuntimeError:  # the launcher is gone: its ranks are told by the kernel, this thread is not needed for it
            return None

    def _report(self, stalled_s):
        """One line per rank that keeps the run waiting, or None where a lower rank says it."""
        first = self._others()
        self._closed.wait(_MISSED_BEATS * self._interval_s)
        second = self._others()
        silent = [rank for rank in second if rank in first and first[rank][0] == second[rank][0]]
        if any(rank < self._world.rank and rank not in silent for rank in second):
            return None
        beats = {self._world.rank: [0, self._phase, stalled_s, self._where()], **second}
        lines = [f"no progress for {stalled_s:.0f} s (--hang-timeout {self._timeout_s:g})"]
        for rank, (_, phase, seconds, where) in sorted(beats.items()):
            if rank in silent:
                lines.append(f"rank {rank} gives no sign of life, last seen {phase}; {where}")
            elif phase != WAITING:
                lines.append(f"rank {rank} is {phase} for {seconds:.0f} s; {where}")
        lines += [f"rank {rank} was never heard of" for rank in range(self._world.size) if rank not in beats]
        if len(lines) == 1:
            lines.append("all ranks wait for each other; look at the network between them")
        return "\n  ".join(lines)
