"""What a training needs of a machine, checked before it starts: a line for each need, each failure with its remedy."""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import resource
import shutil
import sys

from common import cli, parallel
from common.device.finding import Finding, ports
from common.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHONS = ((3, 10), (3, 12))
# Newest, previous and best checkpoint and a temporary, each of a few hundred megabytes.
DISK_BYTES = 2 * 2**30
SHARED_MEMORY = "/dev/shm"
GREEN, RED, PLAIN = "\033[32m", "\033[31m", "\033[0m"


@dataclasses.dataclass(frozen=True)
class PreflightConfig:
    """What the training will be started with.

    Raises:
      UserError: a value outside its range.
    """

    device: str = cli.option("auto", "auto, npu, cuda or cpu", choices=("auto", "npu", "cuda", "cpu"))
    devices: int = cli.option(1, "devices of this machine to use", low=1)
    device_id: int = cli.option(0, "index of the device, where one is used", low=0)
    data: str = cli.option("", "dataset root that holds train/ and val/; left out: not checked")
    output_dir: str = cli.option("output", "folder that runs are written to")
    batch_size: int = cli.option(256, "images per step of this machine", "-b", low=1)
    image_size: int = cli.option(299, "side of the square input, pixels", low=32)
    workers: int = cli.option(8, "loader processes of this machine, at most its cores", "-j", low=0)
    master_port: int | None = cli.option(None, "TCP port that machine 0 of several will open", low=1, high=65535)

    def __post_init__(self):
        cli.check_ranges(self)

    @property
    def last(self):
        """Highest index of a device that is used."""
        return self.devices - 1 if self.devices > 1 else self.device_id


def findings(config, load_data=None):
    """Check the machine.

    Args:
      config: PreflightConfig.
      load_data: called without arguments, returns the index.Splits; default: those of config.data, if given.
    Returns:
      list of Finding.
    """
    found = [_python(), *_packages()]
    complete = not any(each.remedy for each in found)
    if complete:  # these import the packages
        found += [*_device(config), *_loading(config)]
    else:
        found.append(Finding("device, memory, data", "not looked for", "install the packages above first"))
    if config.master_port:
        found.append(ports("master port", [config.master_port], "give another --master_port on every machine"))
    found.append(_disk(config.output_dir))
    if complete and (load_data or config.data):
        found.append(_data(load_data, config.data))
    return found


def _python():
    version = ".".join(map(str, sys.version_info[:3]))
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Finding("Python", f"{version} ({sys.executable})")
    low, high = (".".join(map(str, each)) for each in PYTHONS)
    return Finding("Python", version, f"use Python {low} to {high}: `make venv PYTHON=python{high}`, or set PYTHON")


def _packages():
    """torch, and the other packages of requirements.txt in one line."""
    missing, present = [], []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, low, high = re.match(r"([\w-]*)(?:>=([\d.]+))?(?:,<([\d.]+))?", line).groups()
        if not name:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        fits = version[0].isdigit() and (not low or _numbers(low) <= _numbers(version))
        fits = fits and (not high or _numbers(version) < _numbers(high))
        (present if fits else missing).append((name, version, line))
    remedy = "`make venv`, or `pip install -r requirements.txt`"
    torch = [each for each in present if each[0] == "torch"]
    yield Finding("torch", torch[0][1]) if torch else Finding("torch", _words(missing, "torch"), remedy)
    others = [each for each in missing if each[0] != "torch"]
    yield Finding("packages", _words(others), remedy) if others else Finding("packages", f"{len(present)} installed")


def _words(packages, only=""):
    return ", ".join(f"{name} {version} ({line})" for name, version, line in packages if only in ("", name))


def _numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _device(config):
    """The device itself, and what its kind needs besides."""
    from common.device import device as devices
    from common.device import npu_preflight

    try:
        device = devices.choose(config.device, config.last)
    except UserError as error:
        found, _, remedy = str(error).removeprefix("--device: ").partition("; ")
        yield Finding("device", found, remedy or "give a smaller --devices, or another --device")
        kind = config.device
    else:
        yield Finding("device", device.describe())
        kind = device.kind
    yield from npu_preflight.findings(kind, config.last + 1, config.devices > 1 or config.master_port is not None)


def _loading(config):
    """Shared memory and open files of the loader processes, which hand their batches over in both."""
    from common.data import sampling

    processes = config.devices
    workers = parallel.dataloader_workers(config.workers, processes)
    in_flight = workers * sampling.PREFETCH
    need = processes * in_flight * -(-config.batch_size // processes) * 3 * config.image_size**2
    if os.path.isdir(SHARED_MEMORY):
        free = shutil.disk_usage(SHARED_MEMORY).free
        text = f"{_size(free)} free, the loaders take up to {_size(need)}"
        remedy = "fewer -j, a smaller --batch_size, or a larger /dev/shm (docker run --shm-size=64g, or --ipc=host)"
        yield Finding("shared memory", text, remedy if free < need else "")
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 256 + 4 * workers + 3 * in_flight  # this process, pipes, and three tensors of each batch
    text = f"{limit}, each process takes up to {files}"
    higher = f"`ulimit -n {min(most, 65536)}`" if most >= files else "ask the administrator for more (limits.conf)"
    yield Finding("open files", text, f"{higher}, or fewer -j" if limit < files else "")


def _disk(folder):
    where = pathlib.Path(folder).absolute()
    while not where.exists():
        where = where.parent
    if not where.is_dir() or not os.access(where, os.W_OK):
        return Finding("disk", f"{where} cannot be written to", "give another --output_dir")
    free = shutil.disk_usage(where).free
    remedy = f"free {_size(DISK_BYTES)} for the checkpoints, or give another --output_dir"
    return Finding("disk", f"{_size(free)} free in {where}", remedy if free < DISK_BYTES else "")


def _data(load_data, folder):
    from common.data import index

    try:
        splits = load_data() if load_data else index.load_splits(folder)
    except UserError as error:
        found, _, remedy = str(error).partition("; ")
        return Finding("data", found, remedy or "see the section on data of the model's README")
    val = f"{len(splits.val)} for validation" if splits.val is not None else "no validation set"
    return Finding("data", f"{len(splits.train)} images in {len(splits.classes)} classes, {val}")


def _size(count):
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def show(found, file=None):
    """Print the table; colors only on a terminal.

    Returns:
      0, or 1 where something is amiss.
    """
    file = file or sys.stdout
    colors = file.isatty() and "NO_COLOR" not in os.environ
    width = max(len(each.what) for each in found)
    for each in found:
        word = f"{'FAIL' if each.remedy else 'ok':4}"
        if colors:
            word = f"{RED if each.remedy else GREEN}{word}{PLAIN}"
        print(f"{each.what:{width}}  {word}  {each.found}", file=file)
        if each.remedy:
            print(f"{'':{width}}        -> {each.remedy}", file=file)
    failed = sum(bool(each.remedy) for each in found)
    verdict = f"{failed} of {len(found)} checks failed" if failed else f"all {len(found)} checks passed"
    print(verdict, file=file, flush=True)
    return 1 if failed else 0


def main(description):
    with cli.exit_on_error():
        config, _ = cli.parse(PreflightConfig(), description)
        sys.exit(show(findings(config)))
