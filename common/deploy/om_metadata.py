"""Metadata of an OM file: run_atc.py records it in NAME.om.json; of other files, the model itself is asked."""

import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence

from common import processes
from common.deploy import front_end
from common.device import cann_failure
from common.errors import EXIT_USER_ERROR, UserError
from common.evaluation import om_session
from common.evaluation.om_session import OmMetadata
from common.files import write_atomic


def write(om: pathlib.Path, metadata: OmMetadata) -> None:
    """Record the metadata of an OM file that was just built."""
    write_atomic(om_session.record_path(om), json.dumps({**metadata, "om_bytes": om.stat().st_size}) + "\n")


def sources_of(paths: Iterable[pathlib.Path]) -> list[list[str | int]]:
    """State of the files that an OM file is built from, by which a change of them is noticed."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def is_up_to_date(om: pathlib.Path, command: Sequence[str], sources: list[list[str | int]]) -> bool:
    """Whether an existing OM file is what `command` would build; otherwise it may be replaced.

    Raises:
      UserError: it is of other origin, or its sources have not changed since and it was built by another command.
    """
    remedy = "remove it or choose another --output"
    metadata = om_session.read_record(om)
    if not metadata:
        raise UserError(f"--output: {om} exists and was not made by run_atc.py; {remedy}")
    before = metadata.get("sources", sources)
    is_changed = [path for path, *_ in before] == [path for path, *_ in sources] and before != sources
    is_older = om.stat().st_mtime_ns < max(int(modified) for _, _, modified in sources)
    if is_changed or ("sources" not in metadata and is_older):  # an earlier version recorded no sources
        return False
    ignored = ("--log=", "--output=")  # the name of an OM file may end with a platform
    built, wanted = (
        {word for word in words if not word.startswith(ignored)} for words in (metadata.get("command", []), command)
    )
    if built == wanted:
        return True
    instead = " ".join(sorted(built - wanted)) or "other options"
    raise UserError(f"--output: {om} exists and was built with {instead} from what has not changed since; {remedy}")


def ask(om: pathlib.Path, device: int) -> OmMetadata:
    """What a model says about itself on a device.

    Raises:
      UserError: it cannot be loaded there.
    """
    root = str(pathlib.Path(om_session.__file__).parents[2])
    # Not `python -m`: a folder `common` in the working directory would come first.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from common.evaluation import om_session; "
        "om_session.main(*sys.argv[2:])"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "metadata.json")
        done = processes.run_program(
            [sys.executable, "-c", code, root, str(om), str(device), str(out)], env=os.environ | front_end.ENVIRONMENT
        )
        if out.exists():  # whatever happened when the device was given back
            return json.loads(out.read_text())
    lines = done.stdout.rstrip().splitlines()
    if done.returncode == EXIT_USER_ERROR and lines and lines[-1].startswith("error: "):
        raise UserError(lines[-1].removeprefix("error: "))
    raise UserError(f"--model: {om} on device {device}: {cann_failure.explain(done.stdout)}")
