"""Start the ranks of a launcher: check everything once, then run torchrun's agent and return its exit status.

    python common/launch/launch.py NAME SCRIPT [key=value ...] -- [options of SCRIPT ...] -- [user's arguments ...]

Called by common/launch/launch.sh. The user's arguments are `--key=value ...`, then optionally `--` and options that are
passed to SCRIPT unchanged.
"""

import importlib.util
import os
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from common import cli, run_folder
from common.config import AUTO
from common.device import cann
from common.errors import UserError
from common.launch.config import LaunchConfig, parse_keys, program_arguments

if TYPE_CHECKING:
    import torch.distributed as dist

    from common.train.program import TrainProgram


def split(argv: list[str]) -> tuple[str, str, list[str], list[str], list[str], list[str]]:
    """(name, script, launcher's keys, launcher's options, user's keys, user's options) of this program's arguments."""
    if len(argv) < 2:
        raise UserError(f"NAME SCRIPT: missing; a launcher starts this program:\n{__doc__}")
    name, script, *rest = argv
    defaults, rest = _cut(rest)
    options, rest = _cut(rest)
    keys, passthrough = _cut(rest)
    return name, script, ["--" + pair for pair in defaults], options, keys, passthrough


def _cut(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before and after the first `--`."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def restart_arguments(config: LaunchConfig, program: "TrainProgram", arguments: list[str]) -> list[str]:
    """Arguments of ranks that may be restarted: their run folder is fixed here, and they resume from it.

    Raises:
      UserError: options that cannot be combined with restarts.
    """
    train, _ = program.parse(arguments)
    if train.evaluate:
        return arguments
    if train.resume not in ("", "auto"):
        raise UserError(
            f"--resume: {train.resume}, with --max_restarts or --nnodes=MIN:MAX only auto is possible; "
            "--pretrained starts from the weights of a file"
        )
    if not train.output_dir and config.max_nodes > 1:
        raise UserError("--output_dir: missing; with restarts on several nodes give a folder that all of them see")
    folder: str | pathlib.Path = train.output_dir
    if not folder:
        parent = run_folder.OUTPUT / program.run_name(train)
        runs = run_folder.numbered_runs(parent) if train.resume else []
        folder = runs[-1] if runs else run_folder.new_run(parent)
    return [*arguments, f"--output-dir={folder}", "--resume=auto"]


def launch(argv: list[str]) -> int:
    """Check, then start the ranks; returns their exit status. A single rank replaces this process and checks itself."""
    name, script, defaults, options, keys, passthrough = split(argv)
    config = parse_keys(defaults, keys)
    arguments = program_arguments(config, name, options, passthrough)
    command = [sys.executable, script, *arguments]
    if config.dry_run == "true":
        ranks = config.devices * config.max_nodes
        print((f"[{ranks} ranks] " if ranks > 1 else "") + shlex.join(command))
        return 0
    cli.check_required(config)
    if config.rank_table_file and not os.path.isfile(config.rank_table_file):
        note = "not found; the ranks find each other without it"
        print(f"RANK_TABLE_FILE: {config.rank_table_file} {note}", file=sys.stderr)
    # Otherwise torch prints a warning at every connection to a node whose address has no host name.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    program = load_program(script)
    if config.preflight == "true" and _preflight(config, program, arguments):
        return 1
    train, _ = program.parse(arguments)
    cann.set_hccl_environment(config.local_addr, train.rendezvous_timeout)
    if config.devices * config.max_nodes == 1 and not config.is_elastic:
        sys.stdout.flush()
        os.execv(sys.executable, command)  # it makes the same checks, and torch is imported once
    # A node that joins later finds a used run folder, that of the run it joins.
    joins = ["--resume=auto"] if config.is_elastic and config.node_rank > 0 else []
    for num_nodes in range(config.min_nodes, config.max_nodes + 1):
        settings = program.check([*arguments, *joins], config.devices * num_nodes, num_nodes)
    if config.is_elastic:
        command = [sys.executable, script, *restart_arguments(config, program, arguments)]
    from common.launch import elastic

    store = join_rendezvous(config, script, settings) if config.max_nodes > 1 else None
    return elastic.run_agent(config, command, settings["--rendezvous-timeout"], store)


def load_program(script: str | os.PathLike[str]) -> "TrainProgram":
    """PROGRAM of a training script."""
    spec = importlib.util.spec_from_file_location("program_to_launch", script)
    assert spec and spec.loader, script
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PROGRAM


def _preflight(config: LaunchConfig, program: "TrainProgram", arguments: list[str]) -> int:
    """Print the table of preflight checks; returns 0, or 1 if a check failed."""
    from common.launch import preflight

    train, _ = program.parse(arguments)
    checked = preflight.PreflightConfig(
        device=train.device_kind,
        devices=config.devices,
        device_id=train.device_index,
        output_dir=train.output_dir or str(run_folder.OUTPUT),
        batch_size=train.batch_size if train.batch_size != AUTO else preflight.PreflightConfig.batch_size,
        image_size=max(train.image_size, train.evaluation_size),
        workers=train.workers,
        master_port=config.master_port if config.max_nodes > 1 and config.node_rank == 0 else None,
    )
    return preflight.print_table(preflight.run_checks(checked, lambda: program.load_splits(train)))


def join_rendezvous(config: LaunchConfig, script: str, settings: dict[str, Any]) -> "dist.Store":
    """Wait for all nodes and compare them.

    Args:
      settings: what the training program needs to be equal on all nodes.
    """
    import torch

    from common.launch import rendezvous

    rendezvous.choose_interface(config.local_addr, config.master_addr, config.master_port)
    timeout_s = settings["--rendezvous-timeout"]
    if config.is_elastic:  # a node that joins later finds a later checkpoint
        settings = {name: value for name, value in settings.items() if name != "--resume"}
    meeting = rendezvous.Rendezvous(
        config.max_nodes, config.node_rank, config.master_addr, config.master_port, timeout_s, config.is_elastic
    )
    own = {
        "--nnodes": config.max_nodes,
        "--devices": config.devices,
        "code": rendezvous.code_version(script),
        "torch": str(torch.__version__),
    }
    return meeting.join({**own, **settings})


def main(argv: list[str]) -> None:
    with cli.exit_on_error():
        sys.exit(launch(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
