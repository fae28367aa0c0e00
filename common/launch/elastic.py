"""torchrun's agent: runs the ranks of a node, restarts them, and returns their exit status.

A round starts the ranks of all nodes. When a rank dies, or a node joins or leaves, all ranks exit, the agents of all
nodes rendezvous again, and the ranks of the next round resume from the newest checkpoint.
"""

import contextlib
import datetime
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Mapping
from typing import Any

from torch import distributed as dist
from torch.distributed.elastic import rendezvous
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from common import errors
from common.distributed import LAUNCHER_PID, RESTART_SIGNAL
from common.errors import UserError
from common.launch.config import LaunchConfig

# Exit statuses of a rank that end the run without a restart: wrong input, an error that would repeat itself, or told to
# stop.
FINAL_STATUSES = (errors.EXIT_USER_ERROR, errors.EXIT_FINAL, 130, errors.EXIT_TERMINATED)
# Enough for a step and a checkpoint of several hundred megabytes on a slow disk.
_SHUTDOWN_TIMEOUT_S = 600
# How long to wait for more nodes once --nnodes=MIN are there.
_LAST_CALL_S = 10


class FreshStoreHandler(DynamicRendezvousHandler):
    """c10d rendezvous that gives the ranks of every round a new store.

    torch 2.12 makes one store in the first round and reuses it. Ranks of a later round then read addresses that ranks
    of an earlier one left under the same keys, and connect to dead processes unless the key's owner has overwritten it
    in time. A node that joins later never gets the address of that store and waits forever.

    Attributes:
      address: of this node, for the ranks of other nodes.
    """

    address: str

    @classmethod
    def create(cls, parameters: rendezvous.RendezvousParameters, timeout_s: int, address: str) -> "FreshStoreHandler":
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch's own store is then unused
        backend, store = create_backend(parameters)
        seconds = datetime.timedelta(seconds=1)
        timeout = RendezvousTimeout(join=timeout_s * seconds, last_call=_LAST_CALL_S * seconds)
        nodes = parameters.min_nodes, parameters.max_nodes
        handler = cls.from_backend(parameters.run_id, store, backend, *nodes, parameters.local_addr, timeout)
        handler.address = address
        return handler

    def next_rendezvous(self) -> rendezvous.RendezvousInfo:
        info, port = super().next_rendezvous(), 0
        if info.rank == 0:
            self._server = dist.TCPStore(self.address, 0, is_master=True, wait_for_workers=False)  # on a free port
            port = self._server.port
        own_keys = dist.PrefixStore("ranks", info.store)  # torch has written its own store's address without prefix
        store_info = rendezvous.RendezvousStoreInfo.build(info.rank, own_keys, self.address, port)
        return rendezvous.RendezvousInfo(info.store, info.rank, info.world_size, store_info)

    @property
    def use_agent_store(self) -> bool:
        """The agent serves the store instead of rank 0, so that it outlives a rank that hangs."""
        return True


class Agent(LocalElasticAgent):
    """torchrun's agent that keeps the exit statuses of its ranks and does not restart after a final one."""

    statuses: list[int | None] = []

    def _handlers(self) -> list[SubprocessHandler]:
        context = self._pcontext
        return list(context.subprocess_handlers.values()) if isinstance(context, SubprocessContext) else []

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        super()._shutdown(*args, **kwargs)
        self.statuses = [handler.proc.returncode for handler in self._handlers()]

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        # torch would send SIGTERM, which stops the run; with this signal the ranks save their step and exit.
        self._shutdown(RESTART_SIGNAL, self._shutdown_timeout)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            statuses = [failure.exitcode for failure in result.failures.values()]
            if any(status in FINAL_STATUSES for status in statuses):
                self._remaining_restarts = 0
            elif errors.EXIT_RESTART in statuses:
                self._remaining_restarts += 1  # a node joined or left: not a failure of this one
            if self._remaining_restarts:
                failure = describe_failure(result.failures)
                errors.print_error(f"{failure}; all ranks start again from the last saved step")
        return result

    def kill(self) -> None:
        """Kill all ranks and their dataloader workers."""
        for handler in self._handlers():
            if handler.proc.poll() is None:
                handler.close(signal.SIGKILL)
                handler.proc.wait()


def first_failure(failures: Mapping[int, ProcessFailure]) -> ProcessFailure:
    """The cause of a failed round: a rank with a final status, else the first one that did not end for another rank."""

    def order(failure: ProcessFailure) -> tuple[bool, bool, int]:
        status = failure.exitcode
        return status not in FINAL_STATUSES, status == errors.EXIT_PEER_LOST, failure.timestamp

    return min(failures.values(), key=order)


def describe_failure(failures: Mapping[int, ProcessFailure]) -> str:
    """Which rank failed first, and its signal or exit status."""
    first = first_failure(failures)
    if first.exitcode == errors.EXIT_PEER_LOST:
        return "a rank of another node ended, see its output"
    if first.exitcode < 0:
        return f"rank {first.local_rank} of this node was ended by {signal.Signals(-first.exitcode).name}"
    return f"rank {first.local_rank} of this node ended with status {first.exitcode}"


def run_agent(config: LaunchConfig, command: list[str], timeout_s: int, store: dist.Store | None) -> int:
    """Run the ranks of this node until all have ended.

    Args:
      command: of a rank.
      timeout_s: how long the agents of several nodes wait for each other, in seconds.
      store: that of the rendezvous check; this reference keeps it open while the ranks run.
    Returns:
      0, or the exit status of the first rank that failed; 128 + n for one that signal n ended.
    """
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the messages below take the place of its own
    handled = "SIGTERM,SIGINT,SIGQUIT,SIGUSR1"
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        handled += ",SIGHUP"
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", handled)
    os.environ[LAUNCHER_PID] = str(os.getpid())
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no temporary folder: every rank prints
            os.environ[errors.REPORTS] = stack.enter_context(tempfile.TemporaryDirectory(prefix="zoo-"))
        return _run_agent(config, command, timeout_s)


def _run_agent(config: LaunchConfig, command: list[str], timeout_s: int) -> int:
    handler, addresses = _rendezvous_handler(config, timeout_s)
    spec = WorkerSpec(
        role="train",
        local_world_size=config.devices,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=handler,
        max_restarts=config.max_restarts,
        monitor_interval=0.1,
        **addresses,
    )
    agent = Agent(spec, DefaultLogsSpecs(), start_method="spawn", shutdown_timeout=_SHUTDOWN_TIMEOUT_S)
    try:
        result = agent.run()
    except SignalException as error:
        failed = [status for status in agent.statuses if status]
        return _exit_status(failed[0]) if failed else 128 + error.sigval
    except (rendezvous.RendezvousError, dist.DistError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--master-addr: the rendezvous of the nodes failed ({reason}); fewer than --nnodes are there, "
            "node 0 is gone, or the run has ended"
        ) from error
    finally:
        agent.kill()
        handler.shutdown()
    if result is None or not result.is_failed():
        return 0
    first = first_failure(result.failures)
    if first.exitcode < 0 or first.exitcode == errors.EXIT_PEER_LOST:
        failure = describe_failure(result.failures)
        errors.print_error(f"error: {failure}; --resume=auto continues from the last saved step")
    return _exit_status(first.exitcode)


def _rendezvous_handler(config: LaunchConfig, timeout_s: int) -> tuple[rendezvous.RendezvousHandler, dict[str, Any]]:
    """(handler of the agents' rendezvous, addresses for the WorkerSpec)."""
    single = config.max_nodes == 1
    address = config.local_addr or ("127.0.0.1" if single else None)
    is_static = not single and not config.is_elastic
    if is_static:
        options = {"rank": config.node_rank, "timeout": timeout_s}
    else:
        options = {"is_host": config.node_rank == 0}
    parameters = rendezvous.RendezvousParameters(
        backend="static" if is_static else "c10d",
        endpoint="localhost:0" if single else f"{config.master_addr}:{config.master_port}",
        run_id=f"zoo-{os.getpid()}" if single else "zoo",
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=address,
        **options,
    )
    if is_static:
        addresses = {"master_addr": config.master_addr, "master_port": config.master_port, "local_addr": address}
        return rendezvous.registry.get_rendezvous_handler(parameters), addresses
    handler = FreshStoreHandler.create(parameters, timeout_s, address or socket.gethostname())
    return handler, {"local_addr": address}


def _exit_status(returncode: int) -> int:
    """A shell's exit status for a process's return code: 128 + n where signal n ended it."""
    if returncode in (errors.EXIT_FINAL, errors.EXIT_PEER_LOST):
        return 1
    return 128 - returncode if returncode < 0 else returncode
