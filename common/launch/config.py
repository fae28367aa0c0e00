"""Keys of the launchers, and their translation into options of a training program."""

import dataclasses
import re

from common import cli
from common.config import AUTO
from common.errors import UserError

_HELP = """Keys that every launcher accepts, as --key=value. Options of the training program follow after a lone --."""


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Keys of every launcher, one field each. Those in _TRAIN_FLAGS are passed on to the training program.

    Raises:
      UserError: a value outside its range.
    """

    data_path: str = cli.option(
        "",
        "dataset root that holds train/ and val/ (required)",
        name="--data_path",
        required="the folder that holds train/ and val/",
    )
    devices: int = cli.option(1, "processes on this node, one per device", low=1)
    device: str | None = cli.option(None, "auto, npu, cuda or cpu", choices=cli.DEVICES)
    recipe: str = cli.option("", "recipe of the training program")
    device_id: int | None = cli.option(None, "the device to use when devices=1", low=0)
    batch_size: int | None = cli.option(None, "images per step, over this node's devices", low=1, auto=AUTO)
    epochs: int | None = cli.option(None, "passes over the training set", "--train-epochs", low=1)
    lr: float | None = cli.option(None, "peak learning rate", above=0)
    output_dir: str = cli.option("", "run folder; default: a new one under ./output/LAUNCHER")
    resume: str = cli.option("", "checkpoint to continue from, or auto")
    nnodes: str = cli.option("1", "number of nodes, or MIN:MAX if they may join and leave during the run")
    max_restarts: int = cli.option(0, "how often ranks that died are restarted from the last saved step", low=0)
    node_rank: int = cli.option(0, "number of this node, 0 to nnodes-1", low=0)
    local_addr: str = cli.option("", "address of this node, for nnodes > 1")
    master_addr: str = cli.option("127.0.0.1", "address of node 0")
    master_port: int = cli.option(29500, "free TCP port on node 0", low=1, high=65535)
    rendezvous_timeout: int | None = cli.option(None, "seconds to wait until all nodes and ranks are there", low=1)
    preflight: str = cli.option("false", "true: check the machine, stop if a check fails", choices=("true", "false"))
    rank_table_file: str = cli.option("", "accepted: the ranks find each other without it")
    dry_run: str = cli.option("false", "true: print the command and stop", choices=("true", "false"))

    def __post_init__(self) -> None:
        cli.check_ranges(self)
        if not re.fullmatch(r"\d+(:\d+)?", self.nnodes):
            raise UserError(f"--nnodes: {self.nnodes}, must be a number of nodes or MIN:MAX")
        if not 1 <= self.min_nodes <= self.max_nodes:
            raise UserError(f"--nnodes: {self.nnodes}, MIN must be at least 1 and at most MAX")
        if self.node_rank >= self.max_nodes:
            raise UserError(
                f"--node-rank: {self.node_rank}, must be 0 to {self.max_nodes - 1} (--nnodes={self.nnodes})"
            )

    @property
    def min_nodes(self) -> int:
        return int(self.nnodes.partition(":")[0])

    @property
    def max_nodes(self) -> int:
        return int(self.nnodes.rpartition(":")[2])

    @property
    def is_elastic(self) -> bool:
        """Whether ranks may be restarted."""
        return self.max_restarts > 0 or self.min_nodes < self.max_nodes


# Key of the launcher -> option of the training program.
_TRAIN_FLAGS = {
    "recipe": "--recipe",
    "data_path": "--data",
    "device": "--device",
    "device_id": "--device-id",
    "batch_size": "--batch-size",
    "epochs": "--epochs",
    "lr": "--lr",
    "output_dir": "--output-dir",
    "resume": "--resume",
    "rendezvous_timeout": "--rendezvous-timeout",
}


def parse_keys(defaults: list[str], keys: list[str]) -> LaunchConfig:
    """LaunchConfig of the launcher's defaults and the user's keys, all `--key=value`. data_path may be missing.

    Raises:
      UserError: a word of another form, an unknown key (the known ones are listed), a bad value.
    """
    known = sorted(field.name for field in dataclasses.fields(LaunchConfig)) + ["train_epochs"]
    for word in keys:
        key, equals, _ = word.partition("=")
        if word in ("-h", "--help"):
            continue
        if not word.startswith("--") or not equals:
            raise UserError(f"{word}: expected --key=value; options for the program itself go after a lone --")
        if key[2:].replace("-", "_") not in known:
            raise UserError(
                f"{key}: unknown key; known are {', '.join(known)}; options for the program itself go after a lone --"
            )
    config, _ = cli.parse(LaunchConfig(), _HELP, defaults + keys, require=False)
    return config


def program_arguments(config: LaunchConfig, name: str, options: list[str], passthrough: list[str]) -> list[str]:
    """Arguments of the training program; of equal options the last one wins, so the user's come last."""
    values = {flag: getattr(config, key) for key, flag in _TRAIN_FLAGS.items()}
    values["--batch-size"] = "auto" if config.batch_size == AUTO else config.batch_size
    given = [f"{flag}={value}" for flag, value in values.items() if value not in (None, "")]
    if config.min_nodes < config.max_nodes:
        given.append(f"--machines={config.max_nodes}")
    return [*options, f"--run-name={name}", *given, *passthrough]
