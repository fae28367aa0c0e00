"""The installed Python front end of ais_bench: how it spells its options, and which paths it refuses.

At least three programs share this name and the version 0.0.2, so the installed one is asked: its --help for the
options, its modules for the path checks.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import stat
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence

from common import processes
from common.deploy import file_names
from common.device import cann_failure
from common.device.cann_failure import INSTALL_AIS_BENCH
from common.errors import UserError
from common.evaluation.om_session import require_ais_bench

MAX_FILES = 100_000  # in an input folder
MAX_LISTED_FILES = 1024  # separated by commas
MAX_BYTES = 4 * 2**30  # of an input file
OUTPUT_MODE = 0o750  # most permissions of an output folder
# The program of 2023 does not start in an ASCII locale. typer shortens option names in narrow help texts, and frames
# help and errors.
ENVIRONMENT = {"PYTHONUTF8": "1", "COLUMNS": "500", "TYPER_USE_RICH": "0", "TYPER_STANDARD_TRACEBACK": "1"}


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """What a front end accepts.

    Attributes:
      options: its long options.
      checks_paths: it refuses links, blanks, files that others may write, and open output folders (since 2024).
    """

    options: frozenset[str]
    checks_paths: bool

    def spelled(self, name: str) -> str | None:
        """Its option for a name such as output_dirname (--output_dirname or --output-dirname); None: it has none."""
        return next((option for option in self.options if option[2:].replace("-", "_") == name), None)

    def arguments(self, values: Mapping[str, object]) -> list[str]:
        """Options and values as this front end takes them; True is a switch.

        Raises:
          UserError: it has no such option.
        """
        words = []
        for name, value in values.items():
            option = self.spelled(name)
            if option is None:
                raise UserError(f"ais_bench: the installed one has no option --{name}; {INSTALL_AIS_BENCH}")
            words.append(option)
            if value is not True:
                words.append(str(value))
            elif f"--no-{option[2:]}" not in self.options:  # with such a negation the switch takes no value
                words.append("1")
        return words

    def check_readable(self, flag: str, path: str | os.PathLike[str]) -> None:
        """Raise UserError for a model, an input folder or a file in it that this front end refuses."""
        if self.checks_paths and os.path.lexists(path):
            mode = self._check_common(flag, path)
            if mode & 0o022:
                raise UserError(f"{flag}: {path} may be written by others, which ais_bench refuses; chmod go-w {path}")

    def check_inputs(self, argument: str, files: Sequence[pathlib.Path], sample_bytes: int) -> None:
        """Raise UserError for input files, or other entries of their folder, that this front end refuses.

        Args:
          argument: value of --input: a folder, or files separated by commas.
          sample_bytes: size of the largest file.
        """
        if not self.checks_paths:
            return
        is_folder = os.path.isdir(argument)
        most = MAX_FILES if is_folder else MAX_LISTED_FILES
        if len(files) > most:
            where = argument if is_folder else "the list"
            raise UserError(f"--input: {len(files)} files in {where}, this ais_bench takes {most}")
        if sample_bytes > MAX_BYTES:
            raise UserError(f"--input: {files[0]} has {sample_bytes} bytes, this ais_bench takes {MAX_BYTES}")
        if is_folder:
            self.check_readable("--input", argument)
        for path in sorted(entry.path for entry in os.scandir(argument)) if is_folder else files:
            self.check_readable("--input", path)

    def check_output(self, output: str, dirname: str) -> None:
        """Raise UserError where this front end would refuse the output folder."""
        if not self.checks_paths:
            return
        file_names.check_characters("--output-dirname", pathlib.Path(os.path.abspath(dirname)), "ais_bench")
        # It checks --output_dirname as a path in the working directory, too.
        for flag, path in (("--output", output), ("--output-dirname", dirname)):
            if os.path.lexists(path):
                mode = self._check_common(flag, path)
                if not os.path.isdir(path):
                    raise UserError(f"{flag}: {path} is not a folder")
                if mode & ~OUTPUT_MODE & 0o777:
                    raise UserError(
                        f"{flag}: {os.path.abspath(path)} has permissions {mode:04o}, the installed ais_bench takes at "
                        f"most {OUTPUT_MODE:04o}; chmod {OUTPUT_MODE:o} it, or name a folder that does not exist yet"
                    )
            else:
                file_names.check_characters(flag, pathlib.Path(os.path.abspath(path)), "ais_bench")

    def check_devices(self, num_files: int, num_devices: int) -> None:
        """Raise UserError where this front end cannot split the input files over the devices."""
        used = min(num_files, num_devices)
        if self.spelled("divide_input") is None:  # then it splits into parts of equal size, rounded up
            used = -(-num_files // -(-num_files // num_devices))
        if used < num_devices:
            raise UserError(
                f"--device: ais_bench cannot split {num_files} files over {num_devices} devices; use {used}"
            )

    def _check_common(self, flag: str, path: str | os.PathLike[str]) -> int:
        """Check characters, links and owner, and return the permission bits."""
        file_names.check_characters(flag, pathlib.Path(os.path.abspath(path)), "ais_bench")
        found = os.lstat(os.path.abspath(path))
        if stat.S_ISLNK(found.st_mode):
            raise UserError(
                f"{flag}: {path} is a symbolic link, which ais_bench refuses; give {os.path.realpath(path)}"
            )
        if found.st_uid != os.geteuid() and found.st_gid not in os.getgroups():
            raise UserError(f"{flag}: {path} belongs to another user and group, which ais_bench refuses; use a copy")
        return stat.S_IMODE(found.st_mode)


@functools.cache
def installed() -> FrontEnd:
    """The front end that `python -m ais_bench` starts.

    Raises:
      UserError: there is none, or it does not start.
    """
    require_ais_bench()
    done = subprocess.run(
        [sys.executable, "-m", "ais_bench", "--help"],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | ENVIRONMENT,
        preexec_fn=processes.ending_with_this(),
    )
    options = help_options(done.stdout)
    if done.returncode != 0 or "--model" not in options:
        reason = cann_failure.explain(done.stderr or done.stdout)
        raise UserError(f"ais_bench: installed, but it does not start: {reason}")
    package = importlib.util.find_spec("ais_bench")
    assert package is not None  # require_ais_bench
    return FrontEnd(options, _has_path_checks(package.submodule_search_locations or ()))


def help_options(text: str) -> frozenset[str]:
    """The long options that a help text of argparse, click or typer lists.

    Only the columns of names count: the descriptions mention other programs' spellings, and continue on lines that are
    indented further.
    """
    found = set[str]()
    for line in text.splitlines():
        entry = re.match(r"[│|]?[ *]{1,8}(-.*)", line)
        for column in re.split(r"\s{2,}", entry[1]) if entry else ():
            if not column.startswith("-"):
                break
            found.update(re.findall(r"--[A-Za-z][\w-]*(?![\w…-])", column))  # typer cuts off long names: --output-dirn…
    return frozenset(found)


def _has_path_checks(folders: Collection[str]) -> bool:
    return any(any(pathlib.Path(folder, "infer").glob("**/path_security_check.py")) for folder in folders)
