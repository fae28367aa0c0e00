"""Check of all nodes before any rank starts: are they there, reachable, and equal in code, data and options?

Node 0 serves a store at --master_addr and --master_port; every other node connects and writes its settings there. A
missing, unreachable or different node is named on every node within --rendezvous-timeout, where a process group would
only time out. torchrun's agent then uses the same port and store.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Any

from torch import distributed as dist

from common.errors import UserError
from common.ports import bind_error

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface
_REPLY_S = 5  # how long node 0 keeps its store open so that the others read the result


def code_version(script: str | os.PathLike[str]) -> str:
    """Hash of the Python files that a training program runs: common/ and its own folder."""
    digest = hashlib.sha256()
    for folder in (pathlib.Path(__file__).parents[1], pathlib.Path(script).resolve().parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def interface_addresses() -> dict[str, str]:
    """{address: network interface} of this node, IPv4 and IPv6."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            found[socket.inet_ntoa(answer[20:24])] = name
    table = pathlib.Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, name = line.split()
        found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))] = name
    return found


def _describe(addresses: dict[str, str]) -> str:
    """Addresses that other nodes can reach, for a message."""
    local = ("127.", "::1", "fe80:")
    return ", ".join(f"{each} ({name})" for each, name in addresses.items() if not each.startswith(local)) or "none"


def choose_interface(local_addr: str, master_addr: str, master_port: int) -> None:
    """Set the network interface of gloo and nccl to that of this node's address. A variable that is set is kept.

    By default they use the address to which the host name resolves, often loopback or another network.

    Args:
      local_addr: --local_addr; empty: the address from which this node reaches node 0.
    Raises:
      UserError: local_addr is no address of this node.
    """
    own = interface_addresses()
    address = _resolve(local_addr) if local_addr else _source_address(master_addr, master_port)
    if local_addr and address not in own:
        raise UserError(f"--local_addr: {local_addr} is no address of this node; it has {_describe(own)}")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if address in own:
            os.environ.setdefault(variable, own[address])


def _resolve(local_addr: str) -> str:
    try:
        return str(socket.getaddrinfo(local_addr, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        reason = f"is neither an address nor a known name ({error.strerror})"
        raise UserError(f"--local_addr: {local_addr} {reason}") from error


def _source_address(host: str, port: int) -> str | None:
    """The address of this node from which packets to `host` leave; None if there is no route."""
    try:
        family, kind, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # on a datagram socket this chooses the route and sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def _seconds(number: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=number)


class Rendezvous:
    """The check of one launch, on one node.

    Args:
      master_addr, master_port: where node 0 serves the store.
      timeout_s: how long each node waits, in seconds.
      is_elastic: nodes may join later, leave and return: node 0 waits for none, and every other node compares itself
        with it.
    """

    def __init__(
        self, nnodes: int, node_rank: int, master_addr: str, master_port: int, timeout_s: int, is_elastic: bool = False
    ) -> None:
        self.nnodes, self.node_rank, self.timeout_s, self.is_elastic = nnodes, node_rank, timeout_s, is_elastic
        self.host, self.port, self.endpoint = master_addr, master_port, f"{master_addr}:{master_port}"
        self._deadline = time.monotonic() + timeout_s
        self._store: dist.Store

    def join(self, settings: dict[str, Any]) -> dist.Store:
        """Wait for all nodes and compare them.

        Args:
          settings: {name: value} that must be equal on all nodes. A message begins with the name, such as "--lr"; the
            value is anything that JSON can hold.
        Returns:
          the store; keep a reference, torchrun's agent uses the same one.
        Raises:
          UserError: the same message on every node that joined: which node is missing or differs, and in what.
        """
        settings = json.loads(json.dumps(settings))  # as those of the other nodes are read
        try:
            if self.node_rank == 0:
                self._store = self._serve()
                problem = self._compare(settings)
            else:
                self._store = self._connect()
                problem = self._submit(settings)
        except dist.DistError as error:
            raise UserError(
                f"--rendezvous-timeout: the connection to node 0 at {self.endpoint} ended during the rendezvous; "
                "see the message of node 0"
            ) from error
        if problem:
            raise UserError(problem)
        return self._store

    def _left_s(self) -> float:
        return max(1.0, self._deadline - time.monotonic())

    def _serve(self) -> dist.Store:
        """Node 0: the store, served on all addresses of this node."""
        reason = bind_error(self.port)
        if reason:
            raise UserError(
                f"--master_port: {self.port} cannot be opened on this node ({reason}); end the program that uses "
                "it, or give another port on every node"
            )
        # multi_tenant: torchrun's agent, in this process, opens the same port and gets this server.
        store = dist.TCPStore(
            "localhost",
            self.port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=_seconds(self.timeout_s),
        )
        failure = self._probe(min(self._left_s(), 10))
        if failure:
            raise UserError(
                f"--master_addr: {self.host} does not lead to this node, which is node 0 ({failure}); it has "
                f"{_describe(interface_addresses())}"
            )
        return store

    def _connect(self) -> dist.Store:
        """Other nodes: a client of node 0's store."""
        failure = self._probe(self._left_s())
        if failure:
            raise UserError(
                f"--master_addr: node 0 does not answer at {self.endpoint} within {self.timeout_s} s ({failure}); "
                "start it there with --node_rank=0, or correct --master_addr, --master_port or the firewall"
            )
        stores = []

        def connect() -> None:
            with contextlib.suppress(dist.DistError):
                limit = _seconds(self._left_s())
                store = dist.TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=limit)
                stores.append(store)

        # In a thread, because TCPStore ignores its timeout if a server of another kind accepts but does not answer.
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(self._left_s() + 1)
        if not stores:
            raise UserError(
                f"--master_port: what answers at {self.endpoint} is not node 0 of this run; correct --master_addr "
                "or --master_port on every node"
            )
        return stores[0]

    def _probe(self, seconds: float) -> str | None:
        """Try to connect to node 0 for so long; returns None, or why it fails."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=max(0.1, deadline - time.monotonic())).close()
                return None
            except OSError as error:
                reason = "no answer" if isinstance(error, TimeoutError) else str(error.strerror)
            if time.monotonic() > deadline:
                return reason
            time.sleep(0.2)

    def _compare(self, settings: dict[str, Any]) -> str:
        """Node 0: read the settings of all nodes and publish the result: a message, or an empty string."""
        others = () if self.is_elastic else range(1, self.nnodes)
        self._write("settings", settings)
        missing = self._missing("settings", others, self._left_s())
        joined = [node for node in others if node not in missing]
        differences = (difference(node, self._read("settings", node), settings) for node in joined)
        problem = next(filter(None, differences), "")
        if missing and not problem:
            problem = (
                f"--rendezvous-timeout: node {', '.join(map(str, missing))} of {self.nnodes} did not join at "
                f"{self.endpoint} within {self.timeout_s} s; start it with --node_rank={missing[0]} "
                f"--nnodes={self.nnodes}, or see its output"
            )
        self._store.set("rendezvous/result", problem)
        if problem:
            self._missing("received", joined, _REPLY_S)  # the store ends with this process
        return problem

    def _submit(self, settings: dict[str, Any]) -> str:
        """Other nodes: write the settings and return node 0's result."""
        if self._store.add(f"rendezvous/slot/{self.node_rank}", 1) > 1 and not self.is_elastic:
            raise UserError(f"--node_rank: {self.node_rank} is taken by another node; each needs its own number")
        self._write("settings", settings)
        # Node 0 has started to wait before, so its limit ends before this one.
        self._store.wait(["rendezvous/result"], _seconds(self.timeout_s + _REPLY_S))
        problem = self._store.get("rendezvous/result").decode()
        if not problem:  # node 0 has not compared a node that joined later, or one beyond --nnodes
            problem = difference(self.node_rank, settings, self._read("settings", 0))
        self._write("received", None)
        return problem

    def _write(self, key: str, value: Any) -> None:
        self._store.set(f"rendezvous/{key}/{self.node_rank}", json.dumps(value))

    def _read(self, key: str, node: int) -> Any:
        return json.loads(self._store.get(f"rendezvous/{key}/{node}"))

    def _missing(self, key: str, nodes: Iterable[int], seconds: float) -> list[int]:
        """Those of `nodes` that did not write `key` within so many seconds."""
        deadline = time.monotonic() + seconds
        while missing := [node for node in nodes if not self._store.check([f"rendezvous/{key}/{node}"])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return missing


def difference(node: int, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """A message on the first setting in which a node differs from node 0, or an empty string."""
    for name in ours:
        if theirs.get(name) != ours[name]:
            return f"{name}: node {node} has {theirs.get(name)}, node 0 has {ours[name]}; all nodes must have the same"
    return ""
