"""Result of one preflight check."""

import dataclasses
from collections.abc import Sequence

from common.ports import bind_error


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the preflight table.

    Attributes:
      check: what was checked.
      found: what this machine has.
      remedy: what to do about a failed check; empty if it passed.
    """

    check: str
    found: str
    remedy: str = ""


def check_ports(check: str, ports: Sequence[int], remedy: str) -> Finding:
    """Check that TCP ports of this machine are free."""
    taken = [f"{port} ({reason})" for port in ports if (reason := bind_error(port))]
    if taken:
        return Finding(check, f"not free: {', '.join(taken)}", remedy)
    return Finding(check, f"{ports[0]} free" if len(ports) == 1 else f"{ports[0]} to {ports[-1]} free")
