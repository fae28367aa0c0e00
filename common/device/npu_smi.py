"""The name of the Ascend chip in this machine, as atc's --soc_version wants it."""

import re
import shutil
import subprocess

from common.errors import UserError

# Checked by pattern, so that the next chip of a family needs no change here.
KNOWN = re.compile(r"Ascend(310(P\d|B\d)?|910(A|B|ProA|ProB|PremiumA|B\d(C|-1)?|_9\d{3})?|950(PR|DT)_\w+)")
# A card's row: its number and name, then its health. Chip rows have a bus id, process rows a number in that place.
CARD = re.compile(r"^\|\s*(\d+)\s+(\S+)\s*\|\s*(OK|Warning|Alarm|Critical|Unknown|Offline)\s*\|", re.IGNORECASE)
TIMEOUT_S = 60
BY_HAND = "give the chip with --soc-version, for example --soc-version Ascend310P3"


def checked(name):
    """A --soc-version of the user, with the word Ascend where it was left out.

    Raises:
      UserError: not the name of a chip.
    """
    full = name if name.startswith("Ascend") else f"Ascend{name}"
    if not KNOWN.fullmatch(full):
        raise UserError(
            f"--soc-version: {name} is not a chip name; expected one like Ascend310P3, Ascend910B3 or Ascend910_9392"
        )
    return full


class NoAnswer(Exception):
    """npu-smi is missing or failed; the text says which."""


def cards():
    """The rows of npu-smi's table: [(number, name, health)], one for each chip of a dual-chip card.

    Raises:
      NoAnswer: there is no npu-smi, or it does not work.
    """
    if shutil.which("npu-smi") is None:
        raise NoAnswer("there is no npu-smi (it comes with the NPU driver)")
    return [match.groups() for line in _npu_smi("info") if (match := CARD.match(line))]


def find():
    """Ask npu-smi.

    Returns:
      The soc_version of the cards in this machine.
    Raises:
      UserError: no npu-smi, no card, or cards of several kinds; asks for --soc-version.
    """
    try:
        found = [(number, name) for number, name, _ in cards()]
        names = {_soc_version(number, name) for number, name in dict(reversed(found)).items()}
    except NoAnswer as error:
        raise UserError(f"--soc-version: missing, and {error}; {BY_HAND}") from error
    if not names:
        raise UserError(f"--soc-version: missing, and npu-smi info shows no card; {BY_HAND}")
    if len(names) > 1:
        raise UserError(f"--soc-version: this machine has {', '.join(sorted(names))}; choose one")
    return names.pop()


def _soc_version(number, name):
    """The table's name, or the board's where the table shows the family only (Atlas A3, 950)."""
    bare = name.removeprefix("Ascend")
    if re.search(r"[A-Za-z]", bare) and not bare.startswith("950"):
        return checked(bare)
    facts = dict(_pairs(_npu_smi("info", "-t", "board", "-i", number, "-c", "0")))
    chip = facts.get("Chip Name", name).replace(" ", "").removeprefix("Ascend")
    detail = facts.get("NPU Name", "").strip()
    return checked(f"{chip}_{detail}" if detail.isalnum() else chip)


def _pairs(lines):
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(" |"), value.strip(" |")


def _npu_smi(*arguments):
    command = ["npu-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"{' '.join(command)} does not answer ({error})") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise NoAnswer(f"{' '.join(command)} ended with {done.returncode}: {said[-1]}")
    return done.stdout.splitlines()
