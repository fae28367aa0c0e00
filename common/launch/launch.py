"""Start the processes of a launcher: check everything once, run torchrun's agent, pass on signals and the exit status.

    python common/launch.py NAME SCRIPT [key=value ...] -- [options of SCRIPT ...] -- [what the user gave ...]

Called by common/launch.sh. The user's part is `--key=value ...`, then optionally `--` and options that reach SCRIPT
untouched; a later option wins, so the user's come last.
"""

import dataclasses
import importlib.util
import logging
import os
import pathlib
import shlex
import socket
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from common import cli, run_folder
from common.errors import UserError
from common.launch import rendezvous

# Long enough for a step and a checkpoint of several hundred megabytes on a slow disk.
_SAVE_TIMEOUT_S = 600
# How long machines that could take part are waited for when there are enough of them.
_LAST_CALL_S = 10


class Machines(int):
    """A number of machines, or MIN:MAX; as an int it is the largest.

    Attributes:
      fewest: MIN.
    """

    def __new__(cls, text):
        fewest, _, most = str(text).partition(":")
        self = super().__new__(cls, most or fewest)
        self.fewest = int(fewest)
        return self

    def __str__(self):
        return f"{int(self)}" if self.fewest == self else f"{self.fewest}:{int(self)}"


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Keys of every launcher. Those with a `train` flag reach the training program under that name.

    Raises:
      UserError: a value outside its range.
    """

    data_path: str = cli.option("", "dataset root that holds train/ and val/ (required)")
    devices: int = cli.option(1, "processes on this machine, one per device", low=1)
    device: str | None = cli.option(None, "auto, npu, cuda or cpu", choices=("auto", "npu", "cuda", "cpu"))
    device_id: int | None = cli.option(None, "the device to use when devices=1", low=0)
    batch_size: int | None = cli.option(None, "images per step, over this machine's devices", low=1)
    epochs: int | None = cli.option(None, "passes over the training set", "--train-epochs", low=1)
    lr: float | None = cli.option(None, "peak learning rate", above=0)
    output_dir: str = cli.option("", "run folder; default: a new one under ./output/LAUNCHER")
    resume: str = cli.option("", "checkpoint to continue from, or auto")
    nnodes: Machines = cli.option(Machines(1), "machines; MIN:MAX lets them come and go while the run goes on", low=1)
    max_restarts: int = cli.option(0, "how often ranks that died are started again from the last saved step", low=0)
    node_rank: int = cli.option(0, "number of this machine, 0 to nnodes-1", low=0)
    local_addr: str = cli.option("", "address of this machine, for nnodes > 1")
    master_addr: str = cli.option("127.0.0.1", "address of machine 0")
    master_port: int = cli.option(29500, "free TCP port on machine 0", low=1, high=65535)
    rendezvous_timeout: int | None = cli.option(None, "seconds to wait for all machines and ranks to come", low=1)
    preflight: str = cli.option(
        "false", "true: check the machine first, stop where it fails", choices=("true", "false")
    )
    dry_run: str = cli.option("false", "true: print the command and stop", choices=("true", "false"))

    def __post_init__(self):
        cli.check_ranges(self)
        if not 1 <= self.nnodes.fewest <= self.nnodes:
            raise UserError(f"--nnodes: {self.nnodes}, MIN must be at least 1 and at most MAX")
        if self.node_rank >= self.nnodes:
            raise UserError(f"--node-rank: {self.node_rank}, must be 0 to {self.nnodes - 1} (--nnodes={self.nnodes})")

    @property
    def is_elastic(self):
        """Whether ranks may be started more than once."""
        return self.max_restarts > 0 or self.nnodes.fewest < self.nnodes


# Key of the launcher -> flag of the training program.
_TRAIN_FLAGS = {
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


def split(argv):
    """(name, script, recipe keys, recipe options, user keys, user options) of this program's arguments."""
    name, script, *rest = argv
    recipe, _, rest = _cut(rest)
    options, _, user = _cut(rest)
    keys, _, passthrough = _cut(user)
    return name, script, ["--" + pair for pair in recipe], options, keys, passthrough


def _cut(words):
    at = words.index("--") if "--" in words else len(words)
    return words[:at], "--", words[at + 1 :]


def parse_keys(recipe, keys):
    """LaunchConfig of the recipe's and the user's `--key=value` words.

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
    config, _ = cli.parse(LaunchConfig(), __doc__, recipe + keys)
    return config


def program_arguments(config, name, options, passthrough):
    """Command line of the training program."""
    given = [
        f"{flag}={getattr(config, key)}" for key, flag in _TRAIN_FLAGS.items() if getattr(config, key) not in (None, "")
    ]
    if config.nnodes.fewest < config.nnodes:
        given.append(f"--machines={int(config.nnodes)}")
    return [*options, f"--run-name={name}", *given, *passthrough]


def restartable(config, program, arguments):
    """The command line of ranks that may be started again: their folder is known beforehand, and they resume from it.

    Raises:
      UserError: options that do not go together with restarts.
    """
    train, _ = program.parse(arguments)
    if train.evaluate:
        return arguments
    if train.resume not in ("", "auto"):
        raise UserError(
            f"--resume: {train.resume}, with --max_restarts or --nnodes=MIN:MAX only auto is possible; "
            "--pretrained starts from the weights of a file"
        )
    if not train.output_dir and config.nnodes > 1:
        raise UserError("--output_dir: missing; with restarts on several machines give a folder that all of them see")
    parent = run_folder.OUTPUT / program.name_of_run(train)
    folder = train.output_dir or (train.resume and run_folder.numbered_runs(parent)[-1:]) or run_folder.new_run(parent)
    folder = folder[0] if isinstance(folder, list) else folder
    return [*arguments, f"--output-dir={folder}", "--resume=auto"]


def main(argv):
    with cli.exit_on_error():
        name, script, recipe, options, keys, passthrough = split(argv)
        config = parse_keys(recipe, keys)
        arguments = program_arguments(config, name, options, passthrough)
        command = [sys.executable, script, *arguments]
        if config.dry_run == "true":
            ranks = config.devices * config.nnodes
            print((f"[{ranks} ranks] " if ranks > 1 else "") + shlex.join(command))
            return 0
        if not config.data_path:
            raise UserError("--data_path: missing; give the folder that holds train/ and val/")
        # torch otherwise warns at every connection of a machine whose address has no name, beside our own messages.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        program = _program(script)
        if config.preflight == "true" and _preflight(config, program, arguments):
            return 1
        # A machine that comes later finds the folder in use: by the run it is about to join.
        joins = ["--resume=auto"] if config.is_elastic and config.node_rank > 0 else []
        for machines in range(config.nnodes.fewest, config.nnodes + 1):
            facts = program.check([*arguments, *joins], config.devices * machines, machines)
        if config.is_elastic:
            command = [sys.executable, script, *restartable(config, program, arguments)]
        elif config.devices * config.nnodes == 1:
            sys.stdout.flush()
            os.execv(sys.executable, command)
        store = meet_machines(config, script, facts) if config.nnodes > 1 else None
        return run_agent(config, command, facts["--rendezvous-timeout"], store)


def _preflight(config, program, arguments):
    """Check this machine for the training; returns 0, or 1 after a table that shows what is amiss."""
    from common import run_folder
    from common.launch import preflight

    train, _ = program.parse(arguments)
    several = config.nnodes > 1 and config.node_rank == 0
    checked = preflight.PreflightConfig(
        device=train.device_kind,
        devices=config.devices,
        device_id=train.device_index,
        output_dir=train.output_dir or str(run_folder.OUTPUT),
        batch_size=train.batch_size,
        image_size=train.image_size,
        workers=train.workers,
        master_port=config.master_port if several else None,
    )
    return preflight.print_table(preflight.run_checks(checked, lambda: program.load_data(train)))


def meet_machines(config, script, facts):
    """Hold the roll call of the machines.

    Args:
      facts: what the training program needs alike on all machines.
    Returns:
      the store of the roll call.
    Raises:
      UserError: a machine is missing, cannot be reached, or differs.
    """
    import torch

    rendezvous.choose_interface(config.local_addr, config.master_addr, config.master_port)
    timeout_s = facts["--rendezvous-timeout"]
    if config.is_elastic:  # one that comes later finds a later checkpoint
        facts = {name: value for name, value in facts.items() if name != "--resume"}
    call = rendezvous.Rendezvous(
        config.nnodes, config.node_rank, config.master_addr, config.master_port, timeout_s, config.is_elastic
    )
    return call.meet(
        {
            "--nnodes": config.nnodes,
            "--devices": config.devices,
            "code": rendezvous.code_version(script),
            "torch": str(torch.__version__),
            **facts,
        }
    )


def _program(script):
    """The TrainProgram that a script defines."""
    spec = importlib.util.spec_from_file_location("program_to_launch", script)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{sys.executable}: the Python package {error.name} is not installed; run `make venv`, or "
            "`pip install -r requirements.txt` in your own environment"
        ) from error
    return module.PROGRAM


def run_agent(config, command, timeout_s, store=None):
    """Run the ranks of this machine under torchrun's agent until all have ended.

    Args:
      timeout_s: how long the agents of several machines wait for each other, in seconds.
      store: that of the roll call, which must live as long as the ranks do.
    Returns:
      0, or the exit status of the first rank that failed; 128 + n for one that signal n ended.
    """
    # Its own log lines would stand beside the trainer's message; how ranks ended is said below.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError

    from common.launch import elastic

    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    handler, address = _rendezvous(config, timeout_s)
    spec = WorkerSpec(
        role="train",
        local_world_size=config.devices,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=handler,
        max_restarts=config.max_restarts,
        monitor_interval=0.1,
        **address,
    )
    agent = elastic.Agent(spec, DefaultLogsSpecs(), start_method="spawn", shutdown_timeout=_SAVE_TIMEOUT_S)
    try:
        result = agent.run()
    except SignalException as error:
        ended = [status for status in agent.statuses if status not in (0, None)]
        return _exit_status(ended[0]) if ended else 128 + error.sigval
    except (RendezvousError, DistError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--master-addr: the machines did not meet ({reason}); fewer than --nnodes are there, "
            "machine 0 is gone, or the run has ended"
        ) from error
    finally:
        agent.kill()
        handler.shutdown()
    if result is None or not result.is_failed():
        return 0
    first = elastic.first_failure(result.failures)
    if first.exitcode < 0:
        print(
            f"error: {elastic.how_it_ended(result.failures)}; --resume=auto continues from the last saved step",
            file=sys.stderr,
            flush=True,
        )
    return _exit_status(first.exitcode)


def _rendezvous(config, timeout_s):
    """(how the agents of all machines meet, further arguments of the WorkerSpec)."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous import registry as rendezvous

    from common.launch import elastic

    single = config.nnodes == 1
    static = not single and not config.is_elastic
    address = config.local_addr or ("127.0.0.1" if single else None)
    parameters = RendezvousParameters(
        backend="static" if static else "c10d",
        endpoint="localhost:0" if single else f"{config.master_addr}:{config.master_port}",
        run_id=f"zoo-{os.getpid()}" if single else "zoo",
        min_nodes=config.nnodes.fewest,
        max_nodes=int(config.nnodes),
        local_addr=address,
        **({"rank": config.node_rank, "timeout": timeout_s} if static else {"is_host": config.node_rank == 0}),
        **({} if static else {"join_timeout": timeout_s, "last_call_timeout": _LAST_CALL_S}),
    )
    handler = rendezvous.get_rendezvous_handler(parameters)
    if static:
        return handler, dict(
            master_addr=config.master_addr, master_port=config.master_port, local_addr=config.local_addr or None
        )
    return elastic.FreshStores(handler, address or socket.gethostname()), dict(local_addr=address)


def _exit_status(returncode):
    """A shell's exit status for a process's return code: 128 + n where signal n ended it."""
    return 128 - returncode if returncode < 0 else returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
