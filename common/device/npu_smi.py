"""NPUs of this machine as npu-smi lists them, and the chip's name for atc's --soc_version."""

import re
import shutil
import subprocess
from collections.abc import Iterator

from common.errors import UserError

# A pattern instead of a list, so that the next chip of a family needs no change here.
CHIP_NAME = re.compile(r"Ascend(310(P\d|B\d)?|910(A|B|ProA|ProB|PremiumA|B\d(C|-1)?|_9\d{3})?|950(PR|DT)_\w+)")
# First row of a card: number and name, then health. Rows of chips have a bus id there, rows of processes a number.
CARD = re.compile(r"^\|\s*(\d+)\s+(\S+)\s*\|\s*(OK|Warning|Alarm|Critical|Unknown|Offline)\s*\|", re.IGNORECASE)
TIMEOUT_S = 60
_REMEDY = "give the chip with --soc-version, for example --soc-version Ascend310P3"


def check_chip_name(name: str) -> str:
    """The value of --soc-version with the prefix Ascend, which the user may leave out.

    Raises:
      UserError: not the name of a chip.
    """
    full = name if name.startswith("Ascend") else f"Ascend{name}"
    if not CHIP_NAME.fullmatch(full):
        raise UserError(
            f"--soc-version: {name} is not a chip name; expected one like Ascend310P3, Ascend910B3 or Ascend910_9392"
        )
    return full


class NpuSmiError(Exception):
    """npu-smi is missing or failed; the text says which."""


def cards() -> list[tuple[str, str, str]]:
    """(number, name, health) of each NPU; a card with two chips has two rows.

    Raises:
      NpuSmiError: npu-smi is missing or failed.
    """
    if shutil.which("npu-smi") is None:
        raise NpuSmiError("there is no npu-smi (it comes with the NPU driver)")
    return [(match[1], match[2], match[3]) for line in _npu_smi("info") if (match := CARD.match(line))]


def detect_chip_name() -> str:
    """The soc_version of this machine's NPUs.

    Raises:
      UserError: no npu-smi, no card, or cards of several kinds; asks for --soc-version.
    """
    try:
        names_of_cards = {number: name for number, name, _ in reversed(cards())}  # the first row of each card
        names = {_soc_version(number, name) for number, name in names_of_cards.items()}
    except NpuSmiError as error:
        raise UserError(f"--soc-version: missing, and {error}; {_REMEDY}") from error
    if not names:
        raise UserError(f"--soc-version: missing, and npu-smi info shows no card; {_REMEDY}")
    if len(names) > 1:
        raise UserError(f"--soc-version: this machine has {', '.join(sorted(names))}; choose one")
    return names.pop()


def _soc_version(number: str, name: str) -> str:
    """The name in the table, or the board's where the table shows only the family (Atlas A3, 950)."""
    bare = name.removeprefix("Ascend")
    if re.search(r"[A-Za-z]", bare) and not bare.startswith("950"):
        return check_chip_name(bare)
    board = dict(_key_values(_npu_smi("info", "-t", "board", "-i", number, "-c", "0")))
    chip = board.get("Chip Name", name).replace(" ", "").removeprefix("Ascend")
    detail = board.get("NPU Name", "").strip()
    return check_chip_name(f"{chip}_{detail}" if detail.isalnum() else chip)


def _key_values(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(" |"), value.strip(" |")


def _npu_smi(*arguments: str) -> list[str]:
    """Lines that `npu-smi ARGUMENTS` prints."""
    command = ["npu-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NpuSmiError(f"{' '.join(command)} does not answer ({error})") from error
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise NpuSmiError(f"{' '.join(command)} ended with {done.returncode}: {output[-1]}")
    return done.stdout.splitlines()
