"""Ranks of a run: torchrun's environment, the process groups, and collectives on host values.

One process alone, such as an evaluation of an exported file, imports no torch here.
"""

import contextlib
import dataclasses
import datetime
import os
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from common import processes
from common.errors import EXIT_FINAL, EXIT_USER_ERROR, PeerLost, RunError, UserError

if typing.TYPE_CHECKING:
    import torch
    import torch.distributed

    from common.device.device import Device

# Status of a rank at a step boundary. The largest of all ranks' statuses applies to all of them: RUN continues, SAVE
# writes a checkpoint and continues, RESTART and STOP write one and exit with EXIT_RESTART or the signal's status, the
# errors exit with the statuses below.
RUN, SAVE, RESTART, STOP, RUN_ERROR, FINAL_ERROR, USER_ERROR = range(7)
_EXIT_STATUSES = {RUN_ERROR: 1, FINAL_ERROR: EXIT_FINAL, USER_ERROR: EXIT_USER_ERROR}
# Makes a rank save a checkpoint and exit with EXIT_RESTART. Its default action ends programs that do not handle it.
RESTART_SIGNAL = signal.SIGUSR2
# Environment variable with the process id of the launcher, which may be dead before a rank has imported torch.
LAUNCHER_PID = "ZOO_LAUNCHER_PID"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class World:
    """Position of this process among all ranks.

    Attributes:
      rank, size: over all nodes.
      local_rank, local_size: on this node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        return self.size // self.local_size

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_size


def world_from_environment() -> World:
    """The World in torchrun's environment variables; a single process without them."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


class Group:
    """Collectives of a run: the device's process group for device tensors, a gloo group for host values.

    With one process every method returns its input.

    Args:
      device: device of the tensors in `all_reduce_mean_` and `all_gather`; None where this process is alone and has
        no such tensors.
      timeout_s: how long to wait for all ranks to start, in seconds.
    Raises:
      UserError: a rank did not start in time, or the ranks cannot connect to each other.
    """

    def __init__(self, world: World, device: "Device | None", timeout_s: float = 600) -> None:
        self.world, self._device = world, device
        self._host: torch.distributed.ProcessGroup | None = None
        if "WORLD_SIZE" in os.environ:
            # Not SIGTERM: with restarts, the ranks of the other nodes save a checkpoint and continue without this node.
            processes.die_with_parent(int(os.environ.get(LAUNCHER_PID, os.getppid())), RESTART_SIGNAL)
        if world.size == 1:
            return
        import torch.distributed as dist

        self._dist, device = dist, self.device
        try:
            self._store = _wait_for_all_ranks(world, datetime.timedelta(seconds=timeout_s))
            dist.init_process_group(device.backend, store=self._store, rank=world.rank, world_size=world.size)
            self._host = dist.group.WORLD if device.backend == "gloo" else dist.new_group(backend="gloo")
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--master-addr: the {world.size} ranks could not connect to each other: {reason}"
            ) from error

    @property
    def device(self) -> "Device":
        """The device that the group was made for."""
        assert self._device is not None
        return self._device

    def all_reduce_max(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self._host is None:
            return number
        import torch

        tensor = torch.tensor([number], dtype=torch.int32)
        self._dist.all_reduce(tensor, self._dist.ReduceOp.MAX, group=self._host)
        return int(tensor)

    def all_reduce_sum(self, numbers: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, in float64."""
        if self._host is None:
            return [float(number) for number in numbers]
        import torch

        total = torch.tensor(numbers, dtype=torch.float64)
        self._dist.all_reduce(total, group=self._host)
        return total.tolist()

    def all_reduce_mean_(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Average a device tensor over all ranks in place."""
        if self._host is not None:
            self._dist.all_reduce(tensor)
            tensor /= self.world.size
        return tensor

    def all_gather(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Device tensors of equal shape of all ranks, stacked in rank order: [size, ...]."""
        if self._host is None:
            return tensor[None]
        import torch

        parts = [torch.empty_like(tensor) for _ in range(self.world.size)]
        self._dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def all_gather_objects(self, value: T) -> list[T]:
        """Picklable objects of all ranks, in rank order."""
        values = [value] * self.world.size
        if self._host is not None:
            self._dist.all_gather_object(values, value, group=self._host)
        return values

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Block at whose end all ranks meet; they go on if none of them raised a UserError in it.

        Raises:
          UserError: on one rank that raised it; SystemExit on the others.
        """
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        self.sync_status(error=error)

    def from_rank0(self, function: Callable[[], T]) -> T:
        """function() of rank 0, any picklable object, on every rank.

        Raises:
          UserError: on rank 0, which raised it; SystemExit on the others.
        """
        box = []
        with self.agreed():
            box = [function() if self.world.is_main else None]
        if self._host is not None:
            self._dist.broadcast_object_list(box, src=0, group=self._host)
        return box[0]  # type: ignore[return-value]  # None was replaced by rank 0's value

    def sync_status(self, status: int = RUN, error: Exception | None = None) -> int:
        """All-reduce the ranks' statuses, so that all of them save, stop or fail at the same step.

        Args:
          status: RUN, SAVE, RESTART or STOP.
          error: exception that this rank raised, if any.
        Returns:
          the largest status of all ranks.
        Raises:
          `error` on the lowest rank of those with the largest status; SystemExit with the same exit status, without a
            message, on the others.
        """
        if isinstance(error, UserError):
            status, error.every_rank = USER_ERROR, False
        elif error is not None:
            status = FINAL_ERROR if isinstance(error, RunError) and error.is_final else RUN_ERROR
        last = self.world.size - 1
        largest, from_last = divmod(self.all_reduce_max(status * self.world.size + last - self.world.rank), last + 1)
        if largest >= RUN_ERROR:
            if error is not None and self.world.rank == last - from_last:
                raise error
            sys.exit(_EXIT_STATUSES[largest])
        return largest

    def local_rank0_first(self, function: Callable[[], T]) -> T:
        """function() on local rank 0 of every node, then on the other ranks, which find what it cached.

        Raises:
          UserError: on one rank that raised it; SystemExit on the others.
        """
        result: T
        for is_first in (True, False):
            with self.agreed():
                if (self.world.local_rank == 0) == is_first:
                    result = function()
        return result

    def check_same(self, value: Any, name: str, remedy: str = "all nodes must have the same files") -> None:
        """Raise UserError on all ranks if a rank's value differs from rank 0's, because its node has other files."""
        first, *others = self.all_gather_objects(value)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise UserError(
                    f"{name}: rank {rank} has {other}, rank 0 has {first}; {remedy}",
                    every_rank=self.world.local_rank != 0,  # print once per node
                )

    @contextlib.contextmanager
    def reports_once(self) -> Iterator[None]:
        """Block whose exceptions reach the user once, where all ranks share the cause.

        Raises:
          UserError: in place of an exception for lack of memory. PeerLost: another rank ended, or reports the same.
        """
        try:
            yield
        except (UserError, RunError, ImportError):  # agreed between the ranks, or equal on all of a node
            raise
        except Exception as error:
            if "gloo/transport" in str(error):
                raise PeerLost("another rank ended during the run") from error
            if not self._is_first_report(error):
                raise PeerLost("another rank has reported the same error") from error
            from common.device import device as devices

            if memory := devices.exhausted_memory(error):
                place = self._device.describe() if self._device else "cpu"
                found = f"--batch-size: too many images for the memory of {place} ({memory})"
                raise UserError(f"{found}; take fewer, or a larger --accumulate", every_rank=False) from error
            raise

    def _is_first_report(self, error: Exception) -> bool:
        """Whether no other rank has asked this about an exception of the same type, raised at the same line."""
        if self._host is None:
            return True
        *_, last = traceback.extract_tb(error.__traceback__)
        try:
            return self._store.add(f"error/{type(error).__name__}/{last.filename}:{last.lineno}", 1) == 1
        except RuntimeError:  # the store has ended
            return True

    def close(self) -> None:
        """Destroy the process groups, on all ranks at once: gloo aborts a process whose peers are already gone."""
        if self._host is not None:
            self._dist.barrier(group=self._host)
            self._dist.destroy_process_group()


def _wait_for_all_ranks(world: World, limit: datetime.timedelta) -> "torch.distributed.Store":
    """The launcher's store, after every rank has written its key there.

    monitored_barrier cannot do this: it needs a gloo group, whose creation waits for all ranks itself and fails with
    "wait timeout after 4000ms, keys: /0//cpu//0/2"; that of an nccl or hccl group waits for half an hour.
    """
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    store.set(f"started/{world.rank}", "")
    try:
        store.wait([f"started/{rank}" for rank in range(world.size)], limit)
    except dist.DistStoreError as error:
        missing = [rank for rank in range(world.size) if not store.check([f"started/{rank}"])]
        raise UserError(
            f"--rendezvous-timeout: rank {', '.join(map(str, missing))} of {world.size} did not start within "
            f"{int(limit.total_seconds())} s; see the output of its node",
            every_rank=world.local_rank != 0,  # print once per node: rank 0 may be the missing one
        ) from error
    store.set_timeout(datetime.timedelta(minutes=30))  # torch's default, for what the process groups do later
    return store
