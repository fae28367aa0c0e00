"""Several machines meet before any rank starts, and find out whether they can train together.

Machine 0 listens on --master_addr and --master_port; every other machine checks in there with its facts (data set,
code, options). Whoever is missing, in the wrong place or different is named on every machine within
--rendezvous-timeout, where a process group would wait in silence. torchrun's agent then meets on the same port, in the
same store.
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

from common.errors import UserError
from common.ports import bind_error

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface
_HEARD_S = 5  # how long machine 0 stays to let the others read why nobody starts


def code_version(script):
    """Hash of the Python files that a training program runs: the shared ones and those of its own folder."""
    digest = hashlib.sha256()
    for folder in (pathlib.Path(__file__).parents[1], pathlib.Path(script).resolve().parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def addresses():
    """{address: network interface} of this machine, IPv4 and IPv6."""
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


def _listed(found):
    """Addresses that other machines can use, in words."""
    useful = {each: name for each, name in found.items() if not each.startswith(("127.", "::1", "fe80:"))}
    return ", ".join(f"{each} ({name})" for each, name in useful.items()) or "none"


def choose_interface(local_addr, master_addr, master_port):
    """Bind the ranks' connections to the network interface of this machine's address.

    gloo and nccl otherwise take the address that the machine's name resolves to, which on many machines is loopback or
    another network. What the user set stays.

    Args:
      local_addr: --local_addr; empty: the address from which this machine reaches machine 0.
    Raises:
      UserError: local_addr is no address of this machine.
    """
    own = addresses()
    address = _resolved(local_addr, "--local_addr") if local_addr else _address_towards(master_addr, master_port)
    if local_addr and address not in own:
        raise UserError(f"--local_addr: {local_addr} is no address of this machine; it has {_listed(own)}")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if address in own:
            os.environ.setdefault(variable, own[address])


def _resolved(name, flag):
    try:
        return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise UserError(f"{flag}: {name} is neither an address nor a known name ({error.strerror})") from error


def _address_towards(host, port):
    """The address of this machine from which packets to `host` leave; None where it is not reachable (yet)."""
    try:
        family, kind, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of a datagram socket: chooses the route, sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


class Rendezvous:
    """The meeting of one launch.

    Args:
      nnodes, node_rank: number of machines, and of this one among them.
      master_addr, master_port: where machine 0 listens.
      timeout_s: how long each machine waits, in seconds.
      come_and_go: machines may join later, leave and come back: machine 0 waits for nobody, whoever comes compares
        itself with it.
    """

    def __init__(self, nnodes, node_rank, master_addr, master_port, timeout_s, come_and_go=False):
        self.nnodes, self.node_rank, self.timeout_s, self.come_and_go = nnodes, node_rank, timeout_s, come_and_go
        self.host, self.port, self.place = master_addr, master_port, f"{master_addr}:{master_port}"
        self._ends = time.monotonic() + timeout_s

    def meet(self, facts):
        """Wait for all machines and compare them.

        Args:
          facts: {name: value} that must be alike everywhere; a name is what a message begins with, such as "--lr", a
            value is anything that JSON knows.
        Returns:
          the store; keep it, the agent's ranks talk through it.
        Raises:
          UserError: the same sentence on every machine that came: which one is missing or differs, and in what.
        """
        from torch import distributed as dist

        try:
            self.store = self._opened(dist) if self.node_rank == 0 else self._joined(dist)
            verdict = self._judge(facts) if self.node_rank == 0 else self._ask(facts)
        except dist.DistError as error:
            raise UserError(
                f"--rendezvous-timeout: the connection to machine 0 at {self.place} ended while the machines were "
                "meeting; machine 0 says why"
            ) from error
        if verdict:
            raise UserError(verdict)
        return self.store

    def _left_s(self):
        return max(1.0, self._ends - time.monotonic())

    def _opened(self, dist):
        """The store that machine 0 serves on all its addresses."""
        taken = bind_error(self.port)
        if taken:
            raise UserError(
                f"--master_port: {self.port} cannot be opened on this machine ({taken}); end the program that has it, "
                "or give another port on every machine"
            )
        # multi_tenant: torchrun's agent, in this process, asks for the same port and gets this very server.
        store = dist.TCPStore(
            "localhost",
            self.port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=self._wait(self.timeout_s),
        )
        reason = self._knock(min(self._left_s(), 10))
        if reason:
            raise UserError(
                f"--master_addr: {self.host} does not lead to this machine, which is machine 0 ({reason}); it has "
                f"{_listed(addresses())}"
            )
        return store

    def _joined(self, dist):
        """The store of machine 0, seen from another machine."""
        reason = self._knock(self._left_s())
        if reason:
            raise UserError(
                f"--master_addr: machine 0 does not answer at {self.place} within {self.timeout_s} s ({reason}); start "
                "it there with --node_rank=0, or correct --master_addr, --master_port or the firewall"
            )
        stores = []

        def connect():
            with contextlib.suppress(dist.DistError):
                stores.append(
                    dist.TCPStore(
                        self.host,
                        self.port,
                        is_master=False,
                        wait_for_workers=False,
                        timeout=self._wait(self._left_s()),
                    )
                )

        # In a thread of its own: a server of another kind that says nothing makes it wait without any limit.
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(self._left_s() + 1)
        if not stores:
            raise UserError(
                f"--master_port: what answers at {self.place} is not machine 0 of this run; correct --master_addr or "
                "--master_port on every machine"
            )
        return stores[0]

    def _knock(self, seconds):
        """Try to connect to machine 0 for so long; returns None, or why it does not work."""
        ends = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=max(0.1, ends - time.monotonic())).close()
                return None
            except OSError as error:
                reason = "no answer" if isinstance(error, TimeoutError) else error.strerror
            if time.monotonic() > ends:
                return reason
            time.sleep(0.2)

    def _judge(self, facts):
        """Machine 0: hear all, decide, and stay until they know; the mistake in one sentence, or nothing."""
        others = () if self.come_and_go else range(1, self.nnodes)
        self.store.set("rollcall/facts/0", json.dumps(facts))
        missing = self._missing("facts", others, self._left_s())
        ours = json.loads(json.dumps(facts))
        told = {r: json.loads(self.store.get(f"rollcall/facts/{r}")) for r in others if r not in missing}
        differences = [text for r, theirs in told.items() if (text := difference(r, theirs, ours))]
        verdict = next(iter(differences), "") or self._absence(missing)
        self.store.set("rollcall/verdict", verdict)
        if verdict:
            self._missing("heard", told, _HEARD_S)  # machine 0's end is the store's end
        return verdict

    def _ask(self, facts):
        """Another machine: check in and hear what machine 0 decided."""
        if self.store.add(f"rollcall/seat/{self.node_rank}", 1) > 1 and not self.come_and_go:
            raise UserError(f"--node_rank: {self.node_rank} is taken by another machine; each needs its own number")
        self.store.set(f"rollcall/facts/{self.node_rank}", json.dumps(facts))
        # Machine 0 listens already, so its own limit ends before this one.
        self.store.wait(["rollcall/verdict"], self._wait(self.timeout_s + _HEARD_S))
        verdict = self.store.get("rollcall/verdict").decode()
        if not verdict:  # also to one machine too many, whose facts machine 0 never read
            zero = json.loads(self.store.get("rollcall/facts/0"))
            verdict = difference(self.node_rank, json.loads(json.dumps(facts)), zero)
        self.store.set(f"rollcall/heard/{self.node_rank}", "")
        return verdict

    def _missing(self, what, machines, seconds):
        """Those of `machines` that did not write their key `what` within so many seconds."""
        ends = time.monotonic() + seconds
        while missing := [r for r in machines if not self.store.check([f"rollcall/{what}/{r}"])]:
            if time.monotonic() > ends:
                break
            time.sleep(0.1)
        return missing

    def _absence(self, missing):
        if not missing:
            return ""
        names = ", ".join(map(str, missing))
        return (
            f"--rendezvous-timeout: machine {names} of {self.nnodes} did not come to {self.place} within "
            f"{self.timeout_s} s; start it with --node_rank={missing[0]} --nnodes={self.nnodes}, or see what it says"
        )

    @staticmethod
    def _wait(seconds):
        return datetime.timedelta(seconds=seconds)


def difference(machine, theirs, ours):
    """The first fact in which a machine differs from machine 0 as a sentence, or an empty string."""
    for name in ours:
        if theirs.get(name) != ours[name]:
            return (
                f"{name}: machine {machine} has {theirs.get(name)}, machine 0 has {ours[name]}; "
                "all machines must have the same"
            )
    return ""
