"""Ranks: torchrun's environment, the process group, and the few things ranks tell each other on the host."""

import contextlib
import ctypes
import dataclasses
import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist

from common.errors import EXIT_USER_ERROR, RunError, UserError

# What a rank says before each step; the largest value wins on all ranks. SAVE goes on afterwards, RESTART ends to be
# started again, STOP ends, FAILED ends with status 1, WRONG with 2.
RUN, SAVE, RESTART, STOP, FAILED, WRONG = range(6)
# Sent to a rank that shall save and end with EXIT_RESTART; ends a program that does not listen.
RESTART_SIGNAL = signal.SIGUSR2


@dataclasses.dataclass(frozen=True)
class World:
    """Place of this process among all.

    Attributes:
      rank, size: global.
      local_rank, local_size: on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self):
        """Rank 0 prints and writes."""
        return self.rank == 0

    @property
    def machines(self):
        return self.size // self.local_size

    @property
    def machine(self):
        """Number of this rank's machine, counted from 0."""
        return self.rank // self.local_size


def world_from_environment():
    """The World that torchrun's agent describes; a single process without it."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


class Group:
    """Collectives of a run: `model` group for device tensors, a gloo group for numbers on the host.

    With one process every method returns its input.

    Args:
      world: World.
      device: Device whose tensors the model group moves.
      timeout_s: how long to wait for all ranks to come, in seconds.
    Raises:
      UserError: a rank did not come, or the ranks cannot reach each other.
    """

    def __init__(self, world, device, timeout_s=600):
        self.world, self._host = world, None
        if "WORLD_SIZE" in os.environ:
            _die_with_parent()
        if world.size == 1:
            return
        try:
            store = _all_ranks_here(world, datetime.timedelta(seconds=timeout_s))
            dist.init_process_group(device.backend, store=store, rank=world.rank, world_size=world.size)
            self._host = dist.group.WORLD if device.backend == "gloo" else dist.new_group(backend="gloo")
        except dist.DistError as error:
            raise UserError(
                f"--master-addr: the {world.size} ranks did not find each other: {str(error).splitlines()[0]}"
            ) from error

    def agree(self, status):
        """The largest of all ranks' statuses."""
        if self._host is None:
            return status
        flag = torch.tensor([status], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._host)
        return int(flag)

    def sync_status(self, status=RUN, error=None):
        """Tell the other ranks how this one is, and hear how they are.

        Args:
          status: RUN, SAVE, RESTART or STOP.
          error: the exception this rank met, if any.
        Returns:
          what all ranks do now: the largest of their statuses.
        Raises:
          the error itself on the rank that met it; SystemExit with the same status, in silence, on all others.
        """
        if error is not None:
            status = WRONG if isinstance(error, UserError) else FAILED
        agreed = self.agree(status)
        if error is not None:
            raise error
        if agreed in (FAILED, WRONG):
            sys.exit(EXIT_USER_ERROR if agreed == WRONG else 1)
        return agreed

    def local_rank0_first(self, function):
        """function() on one rank of every machine, then on the others, which find what it cached.

        Raises:
          UserError: of the rank that met it; SystemExit on all others.
        """
        result = None
        for is_first in (True, False):
            error = None
            if (self.world.local_rank == 0) == is_first:
                try:
                    result = function()
                except UserError as found:
                    error = found
                    error.every_rank = False  # a rank that never gets its turn cannot report it
            self.sync_status(error=error)
        return result

    def check_same(self, value, name):
        """Raise UserError on the ranks whose value differs from rank 0's (their machine reads other files)."""
        expected, error = self.from_main(value), None
        if value != expected:
            error = UserError(
                f"{name}: rank {self.world.rank} sees {value}, rank 0 {expected}; every machine must "
                "hold the same files",
                every_rank=False,
            )
        self.sync_status(error=error)

    def sum(self, numbers):
        """Element-wise sum of a list of host numbers over all ranks, in float64."""
        total = torch.tensor(numbers, dtype=torch.float64)
        if self._host is not None:
            dist.all_reduce(total, group=self._host)
        return total.tolist()

    def from_main(self, value):
        """Rank 0's value (any picklable object) on every rank."""
        if self._host is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host)
        return box[0]

    def mean_(self, tensor):
        """Average a device tensor over all ranks in place."""
        if self._host is not None:
            dist.all_reduce(tensor)
            tensor /= self.world.size
        return tensor

    def gather(self, tensor):
        """All ranks' tensors of equal shape, stacked in rank order: [size, ...]."""
        if self._host is None:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world.size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def close(self):
        """Leave the group, together: gloo's threads abort a process whose peers are already gone."""
        if self._host is not None:
            dist.barrier(group=self._host)
            dist.destroy_process_group()


_LOADER_REMEDY = "where memory is short, take fewer --workers; --resume auto continues from the last saved step"


@contextlib.contextmanager
def translate_worker_failures():
    """Turn what torch raises when another rank or a loader process died into one line.

    Raises:
      RunError: in place of torch's RuntimeError, or of what multiprocessing raises.
    """
    print_unraisable = sys.unraisablehook
    # torch raises from a signal handler; where that meets code which cannot raise, the loader finds out a little later.
    sys.unraisablehook = lambda lost: _is_about_loader(lost.exc_value) or print_unraisable(lost)
    try:
        yield
    except (ConnectionResetError, ConnectionRefusedError, EOFError) as error:  # it died while it handed over a batch
        raise RunError(f"a loader process died ({type(error).__name__}); {_LOADER_REMEDY}") from error
    except RuntimeError as error:
        if "gloo/transport" in str(error):
            raise RunError(
                "another rank ended in the middle of the run; its own message or the launcher says why; "
                "--resume auto continues from the last saved step"
            ) from error
        if _is_about_loader(error):
            raise RunError(f"a loader process died ({str(error).splitlines()[0]}); {_LOADER_REMEDY}") from error
        raise
    else:  # after a loss not: what is left of a loader is freed at the end of the process
        sys.unraisablehook = print_unraisable


def _is_about_loader(error):
    """Whether torch says that a loader process died, or frees a loader whose start that death interrupted."""
    if isinstance(error, AttributeError):
        return type(error.obj).__name__ == "_MultiProcessingDataLoaderIter"
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def _all_ranks_here(world, limit):
    """The store of the launch, once every rank has been seen in it: a process group would wait half an hour."""
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    store.set(f"here/{world.rank}", "")
    try:
        store.wait([f"here/{rank}" for rank in range(world.size)], limit)
    except dist.DistStoreError as error:
        missing = [rank for rank in range(world.size) if not store.check([f"here/{rank}"])]
        raise UserError(
            f"--rendezvous-timeout: rank {', '.join(map(str, missing))} of {world.size} did not come within "
            f"{int(limit.total_seconds())} s; see what its machine says",
            every_rank=world.local_rank != 0,  # once on each machine: rank 0 may be the one that is missing
        ) from error
    store.set_timeout(datetime.timedelta(minutes=30))  # what comes later may take as long as torch allows
    return store


def _die_with_parent():
    """Ask Linux to tell this rank when its launcher dies, so that a killed launcher leaves no process behind.

    The ranks of other machines go on without it where the run may be restarted, so this is no SIGTERM, which ends all.
    """
    pr_set_pdeathsig = 1
    try:
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, RESTART_SIGNAL)
    except (OSError, AttributeError):  # not Linux: the launcher's own shutdown has to do
        return
