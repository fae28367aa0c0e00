"""Preflight checks of a machine before training: one line per check, and a remedy for each that fails."""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from common import cli, files, parallel, processes
from common.device import versions
from common.device.finding import Finding, check_ports
from common.errors import UserError

if TYPE_CHECKING:
    from common.data.index import Splits

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHONS = ((3, 10), (3, 12))
# Newest, previous and best checkpoint and a temporary one, several hundred megabytes each.
DISK_BYTES = 2 * 2**30
GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


@dataclasses.dataclass(frozen=True)
class PreflightConfig:
    """What the training will be started with.

    Raises:
      UserError: a value outside its range.
    """

    device: str = cli.option("auto", "auto, npu, cuda or cpu", choices=cli.DEVICES)
    devices: int = cli.option(1, "devices of this machine to use", low=1)
    device_id: int = cli.option(0, "index of the device, where one is used", low=0)
    data: str = cli.option("", "dataset root that holds train/ and val/; left out: not checked")
    output_dir: str = cli.option("output", "folder that runs are written to")
    batch_size: int = cli.option(256, "images per step of this node", "-b", low=1)
    image_size: int = cli.option(299, "side of the square input, pixels", low=32)
    workers: int = cli.option(8, "dataloader workers of this node, at most its cores", "-j", low=0)
    master_port: int | None = cli.option(None, "TCP port that node 0 of several will open", low=1, high=65535)

    def __post_init__(self) -> None:
        cli.check_ranges(self)

    @property
    def last_index(self) -> int:
        """Highest index of a device that is used."""
        return self.devices - 1 if self.devices > 1 else self.device_id


def run_checks(config: PreflightConfig, load_data: "Callable[[], Splits] | None" = None) -> list[Finding]:
    """Check the machine.

    Args:
      load_data: returns the dataset to check; default: that of config.data, if given.
    """
    found = [_check_python(), *_check_packages()]
    has_packages = not any(each.remedy for each in found)
    if has_packages:  # these checks import the packages
        found += [*_check_device(config), *_check_loading(config)]
    else:
        found.append(Finding("device, memory, data", "not checked", "install the packages above first"))
    if config.master_port:
        found.append(check_ports("master port", [config.master_port], "give another --master_port on every node"))
    found.append(_check_disk(config.output_dir))
    if has_packages and (load_data or config.data):
        found.append(_check_data(load_data, config.data))
    return found


def _check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Finding("Python", f"{version} ({sys.executable})")
    low, high = (".".join(map(str, each)) for each in PYTHONS)
    remedy = f"use Python {low} to {high}: `make venv PYTHON=python{high}`, or set PYTHON"
    if sys.version_info[:2] > PYTHONS[1]:
        remedy += f" (newer ones are not tested here; {versions.python_of_cann()})"
    return Finding("Python", version, remedy)


def _check_packages() -> Iterator[Finding]:
    """torch, and all other packages of requirements.txt in one line."""
    installed, unfit = dict[str, str](), dict[str, str]()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        match = re.match(r"([\w-]+)(?:>=([\d.]+))?(?:,<([\d.]+))?", line)
        if not match:
            continue
        name, low, high = match.groups()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        installed[name] = version
        fits = version[0].isdigit() and (not low or versions.numbers(low) <= versions.numbers(version))
        if not fits or (high and versions.numbers(version) >= versions.numbers(high)):
            unfit[name] = f"{name} {version} ({line})"
    remedy = "`make venv`, or `pip install -r requirements.txt`"
    num_fit, torch = len(installed) - len(unfit), unfit.pop("torch", "")
    yield Finding("torch", torch or installed["torch"], remedy if torch else "")
    yield Finding("packages", ", ".join(unfit.values()) or f"{num_fit} installed", remedy if unfit else "")


def _check_device(config: PreflightConfig) -> Iterator[Finding]:
    """The device, and what its kind needs besides torch."""
    from common.device import device as devices
    from common.device import npu_preflight

    try:
        device = devices.choose(config.device, config.last_index)
    except UserError as error:
        found, _, remedy = str(error).removeprefix("--device: ").partition("; ")
        yield Finding("device", found, remedy or "give a smaller --devices, or another --device")
        kind = config.device
    else:
        yield Finding("device", device.describe())
        kind = device.kind
    several = config.devices > 1 or config.master_port is not None
    yield from npu_preflight.run_checks(kind, config.last_index + 1, several)


def _check_loading(config: PreflightConfig) -> Iterator[Finding]:
    """What dataloader workers need to pass on their batches: shared memory, sockets, open files."""
    from common.data import sampling

    workers = parallel.dataloader_workers(config.workers, config.devices)
    in_flight = workers * sampling.PREFETCH
    device_batch_size = -(-config.batch_size // config.devices)
    need = config.devices * in_flight * device_batch_size * 3 * config.image_size**2
    if os.path.isdir(processes.SHARED_MEMORY):
        free = shutil.disk_usage(processes.SHARED_MEMORY).free
        found = f"{_size(free)} free, the dataloaders use up to {_size(need)}"
    else:
        free, found = 0, f"there is no {processes.SHARED_MEMORY}"
    remedy = "fewer -j, a smaller --batch_size, or a larger /dev/shm (docker run --shm-size=64g, or --ipc=host)"
    yield Finding("shared memory", found, remedy if free < need else "")
    try:
        processes.check_temporary_folder()
        yield Finding("temporary files", f"{tempfile.gettempdir()} holds the sockets of dataloader workers")
    except UserError as error:
        found, _, remedy = str(error).partition("; ")
        yield Finding("temporary files", found, remedy if workers else "")
    limit, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 256 + 4 * workers + 3 * in_flight  # this process, pipes, and three tensors of each batch
    found = f"{limit}, each process opens up to {files}"
    higher = f"`ulimit -n {min(maximum, 65536)}`" if maximum >= files else "ask the administrator (limits.conf)"
    yield Finding("open files", found, f"{higher}, or fewer -j" if limit < files else "")


def _check_disk(folder: str) -> Finding:
    try:
        files.check_writable(folder, "--output_dir")
    except UserError as error:
        return Finding("disk", str(error).partition(": ")[2].partition(";")[0], "give another --output_dir")
    path = files.existing_folder(folder)
    free = shutil.disk_usage(path).free
    remedy = f"free {_size(DISK_BYTES)} for the checkpoints, or give another --output_dir"
    return Finding("disk", f"{_size(free)} free in {path}", remedy if free < DISK_BYTES else "")


def _check_data(load_data: "Callable[[], Splits] | None", folder: str) -> Finding:
    from common.data import index

    try:
        splits = load_data() if load_data else index.load_splits(folder)
    except UserError as error:
        found, _, remedy = str(error).partition("; ")
        return Finding("data", found, remedy or "see the section on data of the model's README")
    val = "no validation set" if splits.val is None else f"{len(splits.val)} for validation"
    return Finding("data", f"{len(splits.train)} images in {len(splits.classes)} classes, {val}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def print_table(found: Sequence[Finding], file: TextIO | None = None) -> int:
    """Print the results, in color on a terminal.

    Returns:
      exit status: 0, or 1 if a check failed.
    """
    file = file or sys.stdout
    colors = file.isatty() and "NO_COLOR" not in os.environ
    width = max(len(each.check) for each in found)
    for each in found:
        status = f"{'FAIL' if each.remedy else 'ok':4}"
        if colors:
            status = f"{RED if each.remedy else GREEN}{status}{PLAIN}"
        print(f"{each.check:{width}}  {status}  {each.found}", file=file)
        if each.remedy:
            print(f"{'':{width}}        -> {each.remedy}", file=file)
    failed = sum(bool(each.remedy) for each in found)
    total = f"{failed} of {len(found)} checks failed" if failed else f"all {len(found)} checks passed"
    print(total, file=file, flush=True)
    return 1 if failed else 0


def main(description: str) -> None:
    with cli.exit_on_error():
        config, _ = cli.parse(PreflightConfig(), description)
        sys.exit(print_table(run_checks(config)))
