"""torchrun's agent for runs that are started again: a fresh store for each generation of ranks, final statuses.

A generation is what the agents of all machines start together. When a rank dies, or a machine comes or goes, all ranks
end, the agents meet again and start the next one, which continues from the newest checkpoint.
"""

import os
import signal
import sys

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from common import errors

# A rank that ends with one of these has said all there is to say: its input is wrong, or it was told to stop.
FINAL_STATUSES = (errors.EXIT_USER_ERROR, 130, errors.EXIT_TERMINATED)


class FreshStores(RendezvousHandler):
    """A rendezvous whose every round gives the ranks a store of their own.

    torch (2.12) makes that store once and hands it to all later generations. Their ranks then find the addresses that
    the ranks of the generation before left under the same keys, and connect to processes that are dead, unless the
    owner of a key has already replaced it: a restart fails by chance. A machine that comes later is never told where
    that store is, and waits for ever.

    Args:
      inner: the c10d handler.
      address: address of this machine, on which the ranks of the others can reach it.
    """

    def __init__(self, inner, address):
        self._inner, self._address, self._server = inner, address, None
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch's own does no harm then: an address per round

    def next_rendezvous(self):
        info, port = self._inner.next_rendezvous(), 0
        if info.rank == 0:
            self._server = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)  # a free port
            port = self._server.port
        round_store = PrefixStore("ranks", info.store)  # the keys of the store that torch made stay apart
        meet_at = RendezvousStoreInfo.build(info.rank, round_store, local_addr=self._address, server_port=port)
        return RendezvousInfo(info.store, info.rank, info.world_size, meet_at)

    @property
    def use_agent_store(self):
        """The agent holds the store, not rank 0: it outlives a rank that hangs."""
        return True

    def get_backend(self):
        return self._inner.get_backend()

    def is_closed(self):
        return self._inner.is_closed()

    def set_closed(self):
        return self._inner.set_closed()

    def num_nodes_waiting(self):
        return self._inner.num_nodes_waiting()

    def get_run_id(self):
        return self._inner.get_run_id()

    def shutdown(self):
        return self._inner.shutdown()


class Agent(LocalElasticAgent):
    """torchrun's agent, which remembers how its ranks ended and knows when not to start them again."""

    statuses = ()

    def _shutdown(self, *args, **kwargs):
        super()._shutdown(*args, **kwargs)
        if self._pcontext is not None:
            self.statuses = [handler.proc.returncode for handler in self._pcontext.subprocess_handlers.values()]

    def _stop_workers(self, worker_group):
        # Ranks that can still reach each other save the step they are at; torch would have them stop for good.
        self._shutdown(signal.SIGUSR2, self._shutdown_timeout)

    def _monitor_workers(self, worker_group):
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            ended = [failure.exitcode for failure in result.failures.values()]
            if any(status in FINAL_STATUSES for status in ended):
                self._remaining_restarts = 0
            elif errors.EXIT_RESTART in ended:
                self._remaining_restarts += 1  # a machine comes or goes: not a failure of this one
            if self._remaining_restarts:
                print(
                    f"{how_it_ended(result.failures)}; all ranks start again from the last saved step",
                    file=sys.stderr,
                    flush=True,
                )
        return result

    def kill(self):
        """End all ranks and their loader processes at once."""
        if self._pcontext is not None:
            for handler in self._pcontext.subprocess_handlers.values():
                if handler.proc.poll() is None:
                    handler.close(signal.SIGKILL)
                    handler.proc.wait()


def first_failure(failures):
    """The failure that says most: one with a final status, else the one that came first.

    Args:
      failures: {rank: torch's ProcessFailure}.
    """
    return min(failures.values(), key=lambda failure: (failure.exitcode not in FINAL_STATUSES, failure.timestamp))


def how_it_ended(failures):
    """A few words on the rank that failed first."""
    first = first_failure(failures)
    if first.exitcode < 0:
        return f"rank {first.local_rank} of this machine was ended by {signal.Signals(-first.exitcode).name}"
    return f"rank {first.local_rank} of this machine ended with status {first.exitcode}"
