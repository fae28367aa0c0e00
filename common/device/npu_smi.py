"""NPUs of this machine as npu-smi lists them, and the chip's name for atc's --soc_version."""

import re
import shutil
import subprocess
from collections.abc import Iterator

from common import processes
from common.errors import UserError

# Patterns instead of lists, so that the next chip of a family needs no change here.
_CHIP_NAME = re.compile(
    r"(?:Ascend)?(310)(P\d|B\d)?|(?:Ascend)?(910)(A|B|ProA|ProB|PremiumA|B\d(?:C|-1)?|_9\d{3})?"
    r"|(?:Ascend)?(950)((?:PR|DT)_\w+)",
    re.IGNORECASE,
)
_MIXED_CASE = {"proa": "ProA", "prob": "ProB", "premiuma": "PremiumA"}
_FAMILY = re.compile(r"Ascend(?:310[PB]?|910(?:B(?=\d)|_93)?|950)")
# First row of a card: "| 0     910B3   | OK | ..." or, since 25.7, "| 0   | Ascend950PR   | OK | ...". Rows of chips
# have a number in place of the name, rows of processes follow the heading "Process id".
_CARD = re.compile(
    r"^\|\s*(\d+)\s*[\s|]\s*(Ascend\s?\w[\w-]*|(?:310|910|950)(?:[A-Z_][\w-]*)?)\s*\|\s*([^\s|]+)\s*\|", re.IGNORECASE
)
_DEVICE_IS_USED = "-8020"
TIMEOUT_S = 60
_REMEDY = "give the chip with --soc-version, for example --soc-version Ascend310P3"


def check_chip_name(name: str) -> str:
    """The value of --soc-version as atc spells it; the prefix Ascend and the case of letters are free.

    Raises:
      UserError: not the name of a chip.
    """
    found = _CHIP_NAME.fullmatch(name)
    if not found:
        raise UserError(
            f"--soc-version: {name} is not a chip name; expected one like Ascend310P3, Ascend910B3 or Ascend910_9392"
        )
    digits, rest = found[1] or found[3] or found[5], found[2] or found[4] or found[6] or ""
    if digits == "950":
        return f"Ascend950{rest[:2].upper()}{rest[2:]}"
    return f"Ascend{digits}{_MIXED_CASE.get(rest.lower(), rest.upper())}"


def operator_folder(chip: str) -> str:
    """The folder of CANN's operators for a chip: Ascend310P3 -> ascend310p, Ascend910_9392 -> ascend910_93."""
    family = _FAMILY.match(chip)
    assert family is not None, chip  # check_chip_name
    return family[0].lower()


def operator_package(chip: str) -> str:
    """The package of operators, which CANN has for each chip from 8.5 on: Ascend310P3 -> Ascend-cann-310p-ops."""
    family = operator_folder(chip).removeprefix("ascend")
    return f"Ascend-cann-{'A3' if family == '910_93' else family}-ops"


class NpuSmiError(Exception):
    """npu-smi is missing or failed; the text says which.

    Attributes:
      remedy: what to do.
    """

    def __init__(self, message: str, remedy: str = "install the driver, or mount npu-smi into the container") -> None:
        super().__init__(message)
        self.remedy = remedy


def cards() -> list[tuple[str, str, str]]:
    """(number, name, health) of each NPU; a card with two chips has two rows.

    Raises:
      NpuSmiError: npu-smi is missing or failed.
    """
    if shutil.which("npu-smi") is None:
        raise NpuSmiError("there is no npu-smi (it comes with the NPU driver)")
    lines = _npu_smi("info")
    heading = next((i for i, line in enumerate(lines) if "process id" in line.lower()), len(lines))
    found = [(match[1], match[2], match[3]) for line in lines[:heading] if (match := _CARD.match(line))]
    messages = [line.strip() for line in lines if line.strip() and line.strip()[0] not in "|+"]
    if not found and messages:  # a failure of the driver may end with status 0
        reason = next((line for line in messages if "ret is" in line), messages[0])
        if _DEVICE_IS_USED in reason:
            raise NpuSmiError(
                f"npu-smi info: {reason}",
                "end the container or process that uses the cards; in a container, also mount /usr/local/dcmi and "
                "/etc/ascend_install.info",
            )
        raise NpuSmiError(f"npu-smi info: {reason}", "see `dmesg`; reinstall the driver, or restart the machine")
    return found


def detect_chip_name() -> str:
    """The soc_version of this machine's NPUs.

    Raises:
      UserError: no npu-smi, no card, cards of several kinds, or a name that is not complete; asks for --soc-version.
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
    """The name in the table, or with the board's where the table shows only the family (Atlas A3, 950).

    Raises:
      NpuSmiError: the board does not name the chip either.
    """
    bare = re.sub(r"^Ascend\s?", "", name, flags=re.IGNORECASE)
    if bare != "910" and not bare.startswith("950"):
        return check_chip_name(bare)
    board = ("info", "-t", "board", "-i", number)
    commands = [(*board, "-c", "0"), board]  # the 950 takes no -c
    for command in commands:
        try:
            fields = dict(_key_values(_npu_smi(*command)))
        except NpuSmiError:
            if command == commands[-1]:
                raise
            continue
        chip = re.sub(r"^Ascend\s?", "", fields.get("chip name", ""), flags=re.IGNORECASE)
        detail = fields.get("npu name", "")
        for candidate in (f"{chip}_{detail}", chip):
            if candidate != "910" and _CHIP_NAME.fullmatch(candidate):
                return check_chip_name(candidate)
    raise NpuSmiError(f"npu-smi calls the chip {name} only, its `{' '.join(commands[-1])}` has no NPU Name")


def _key_values(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(" |\t").lower(), value.strip(" |\t")


def _npu_smi(*arguments: str) -> list[str]:
    """Lines that `npu-smi ARGUMENTS` prints."""
    command = ["npu-smi", *arguments]
    try:
        ends_with_this = processes.ending_with_this()
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, preexec_fn=ends_with_this
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NpuSmiError(f"{' '.join(command)} does not answer ({error})") from error
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise NpuSmiError(f"{' '.join(command)} ended with {done.returncode}: {output[-1]}")
    return (done.stdout + done.stderr).splitlines()
