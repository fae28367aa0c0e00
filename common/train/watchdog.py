"""Watchdog of a run: a rank or loader that hangs ends the run with a report, instead of blocking all other ranks.

Every rank records its current phase; a thread publishes it to the other ranks as a heartbeat through the launcher's
store. When the phase of a rank has not changed for --hang-timeout seconds, the rank reads the heartbeats of the others,
reports which ranks block the run, and ends.
"""

import datetime
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from common.distributed import World

WAITING = "waiting for the other ranks"
# A rank whose heartbeat did not change for this many intervals is not running.
_MISSED_HEARTBEATS = 4

Result = TypeVar("Result")


class Watchdog:
    """Watches the progress of this rank.

    Args:
      timeout_s: how long a phase may take, in seconds; 0: no limit.
      position: returns the current step and images in a few words; called from the thread.
      abort: called from the thread with the report, or None where another rank prints it; ends the process.
    """

    def __init__(
        self, world: World, timeout_s: float, position: Callable[[], str], abort: Callable[[str | None], None]
    ) -> None:
        self._world, self._timeout_s, self._position, self._abort = world, timeout_s, position, abort
        self._interval_s = min(max(timeout_s / 10, 0.1), 5)
        self._phase, self._num_phases, self._num_heartbeats = "starting", 0, 0
        self._store: dist.Store | None = None
        self._closed = threading.Event()
        if timeout_s:
            self._publish(0.0)  # before the first step, so that every rank has a heartbeat
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def phase(self, name: str) -> None:
        """This rank made progress and enters a phase."""
        self._phase, self._num_phases = name, self._num_phases + 1

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._timeout_s:
            self._thread.join()

    def _run(self) -> None:
        stalled_s, num_phases, before = 0.0, -1, time.monotonic()
        while not self._closed.wait(self._interval_s):
            now = time.monotonic()
            # The time during which the whole process was stopped (Ctrl-Z, a suspended laptop) does not count.
            stalled_s, before = stalled_s + min(now - before, 2 * self._interval_s), now
            if num_phases != self._num_phases:
                stalled_s, num_phases = 0.0, self._num_phases
            self._publish(stalled_s)
            if stalled_s >= self._timeout_s:
                self._abort(self._report(stalled_s))

    # ---- heartbeats ----------------------------------------------------------------------------------------------

    def _publish(self, stalled_s: float) -> None:
        """Write this rank's heartbeat to the store, where there is one."""
        self._num_heartbeats += 1
        heartbeat = json.dumps([self._num_heartbeats, self._phase, round(stalled_s, 1), self._position()])
        self._with_store(lambda store: store.set(str(self._world.rank), heartbeat))

    def _heartbeats(self) -> dict[int, Any]:
        """{rank: [count, phase, stalled seconds, position]} of the other ranks that have published one."""

        def read(store: dist.Store) -> dict[int, Any]:
            keys = [str(rank) for rank in range(self._world.size) if rank != self._world.rank]
            return {int(key): json.loads(store.get(key)) for key in keys if store.check([key])}

        return self._with_store(read) or {}

    def _with_store(self, action: Callable[[dist.Store], Result]) -> Result | None:
        """Result of `action` on the launcher's store; None where there is none or it does not answer."""
        if self._world.size == 1:
            return None
        try:
            if self._store is None:
                address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                limit = datetime.timedelta(seconds=10)
                store = dist.TCPStore(*address, wait_for_workers=False, timeout=limit)
                self._store = dist.PrefixStore("heartbeat", store)
            return action(self._store)
        except RuntimeError:  # the launcher has ended; the kernel signals its ranks
            return None

    def _report(self, stalled_s: float) -> str | None:
        """One line per rank that blocks the run, or None where a lower rank reports."""
        first = self._heartbeats()
        self._closed.wait(_MISSED_HEARTBEATS * self._interval_s)
        second = self._heartbeats()
        silent = [rank for rank in second if rank in first and first[rank][0] == second[rank][0]]
        if any(rank < self._world.rank and rank not in silent for rank in second):
            return None
        heartbeats = {self._world.rank: [0, self._phase, stalled_s, self._position()], **second}
        lines = [f"no progress for {stalled_s:.0f} s (--hang-timeout {self._timeout_s:g})"]
        for rank, (_, phase, seconds, position) in sorted(heartbeats.items()):
            if rank in silent:
                lines.append(f"rank {rank} sends no heartbeat, last phase: {phase}; {position}")
            elif phase != WAITING:
                lines.append(f"rank {rank} is {phase} for {seconds:.0f} s; {position}")
        lines += [f"rank {rank} never sent a heartbeat" for rank in range(self._world.size) if rank not in heartbeats]
        if len(lines) == 1:
            lines.append("all ranks wait for each other; check the network between them")
        return "\n  ".join(lines)
