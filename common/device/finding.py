"""One line of the table that a preflight check prints."""

import dataclasses

from common.ports import why_taken


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
      what: the need.
      found: what this machine has.
      remedy: what to do; empty where all is well.
    """

    what: str
    found: str
    remedy: str = ""


def ports(what, numbers, remedy):
    """Whether TCP ports are free on this machine."""
    taken = [f"{number} ({reason})" for number in numbers if (reason := why_taken(number))]
    listed = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return Finding(what, f"not free: {', '.join(taken)}", remedy) if taken else Finding(what, f"{listed} free")
