"""Inject faults into a small training; in the end it must have the bits of the run without faults.

    python tests/chaos/chaos.py --faults 280
    python tests/chaos/chaos.py --model inception_v3 --faults 20

Fourteen kinds of faults hit the tiny network of the tests, which sums gradients in a fixed order (--reduce exact), on
1, 2 or 3 ranks with 0 to 3 loader processes; the three real models are killed only, on one rank. Prints a ledger; the
status is 1 where a bit differs, a process hangs or is left behind, or more is lost than the steps since the last
checkpoint that can be read. Ranks are forked from this process, which has torch loaded: that takes longer than the
training between two faults.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import slow_file

from common import processes
from tools import models

SAVE_EVERY, DISK_MIB, SHARED_MEMORY_MIB = 3, 8, 8
KINDS = (
    "killed rank",
    "terminated rank",
    "stopped rank",
    "killed loader process",
    "torn checkpoint",
    "empty checkpoint",
    "full disk",
    "deleted image",
    "corrupted image",
    "other number of ranks",
    "full shared memory",
    "closed output",
    "two starts at once",
    "killed conversion",
)
# Saved steps that may be lost: one save that was being written, one that was damaged afterwards.
LOSS = {kind: 2 * SAVE_EVERY for kind in KINDS} | {
    "terminated rank": 0,
    "other number of ranks": 0,
    "full disk": 0,
    "closed output": 0,
    "two starts at once": 0,
    "killed conversion": 0,
    "torn checkpoint": 3 * SAVE_EVERY,
    "empty checkpoint": 3 * SAVE_EVERY,
}
# Everything that draws random numbers or keeps state beside the weights.
EVERYTHING = [
    "--mixup=0.2",
    "--cutmix=0.5",
    "--auto-augment=trivialaugment",
    "--random-erasing=0.3",
    "--dropout=0.3",
    "--ema=0.9",
]


class Life:
    """The ranks of one start of the training, forked from this process.

    Args:
      is_piped: whether the output of rank 0 passes through another program, `reader`, which can be ended.
    """

    def __init__(self, program, argv, world, log, is_piped=False):
        self.reader = None
        if is_piped:
            with open(log, "ab") as file:
                self.reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file, start_new_session=True)
        self.log, self.world, self.began = log, world, time.monotonic()
        self.offset = log.stat().st_size if log.exists() else 0
        self.store, port = store_process() if world > 1 else (None, 0)
        self.pids = [self._fork(program, argv, rank, port) for rank in range(world)]
        self.statuses = {}
        if self.reader:
            self.reader.stdin.close()  # rank 0 has it

    def _fork(self, program, argv, rank, port):
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            processes.die_with_parent(parent)  # of a chaos that crashed or was killed
            os.setsid()
            output = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1), os.dup2(output, 2)
            if self.reader:
                if rank == 0:
                    os.dup2(self.reader.stdin.fileno(), 1)
                self.reader.stdin.close()
            place = dict(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=self.world,
                LOCAL_WORLD_SIZE=self.world,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                TORCHELASTIC_USE_AGENT_STORE=True,
            )
            os.environ.update({name: str(value) for name, value in place.items()} if self.world > 1 else {})
            program.main(argv)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001  a forked process must not return into its parent's code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def output(self):
        return self.log.read_text()[self.offset :] if self.log.exists() else ""

    def alive(self):
        for pid in self.pids:
            if pid not in self.statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.statuses]

    def signal(self, number, pids=None):
        for pid in pids or self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, seconds=40):
        """Wait until the ranks have ended by themselves; kills and returns those that have not."""
        deadline = time.monotonic() + seconds
        while (late := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.signal(signal.SIGKILL)
        while self.alive():
            time.sleep(0.01)
        if self.store:
            os.kill(self.store, signal.SIGKILL)
            os.waitpid(self.store, 0)
            self.store = None
        if self.reader:
            self.reader.wait()
        return late


def store_process():
    """(process id, port) of a store that outlives the ranks, as the one of torchrun's agent does."""
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        processes.die_with_parent(parent)
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        while True:
            signal.pause()
    os.close(writer)
    with open(reader) as file:
        return pid, int(os.read(file.fileno(), 16))


class Chaos:
    """The training with faults.

    Args:
      program: TrainProgram.
      options: its command line without the folder.
      folder: run folder, on a small disk of its own where faults fill it.
      data: dataset root.
      draw: random.Random; decides everything.
      micro_batches: number of micro-batches of a step.
      worlds: numbers of ranks it may have.
    """

    def __init__(self, program, options, folder, data, draw, micro_batches, worlds):
        self.program, self.folder, self.data, self.draw = program, folder, data, draw
        self.micro_batches, self.worlds = micro_batches, worlds
        self.argv = [
            *options,
            f"--output-dir={folder}",
            "--resume=auto",
            f"--save-every={SAVE_EVERY}",
            "--print-freq=1",
        ]
        self.log, self.life, self.wrong = folder.parents[1] / "chaos.log", None, []  # not on the small disk
        self.ledger = collections.defaultdict(lambda: dict(injected=0, recovered=0, lost=0, most=0))
        self.images = sorted(path for path in data.glob("train/*/*") if path.is_file())

    # ---- output of the training ----------------------------------------------------------------------------------

    def steps_done(self):
        """Optimizer steps behind the last line of this life's metrics, or where it resumed."""
        done = self.resumed_at() or 0
        for line in self.metrics()[self.metrics_before :].splitlines():
            with contextlib.suppress(ValueError):  # cut off where the disk was full
                record = json.loads(line)
                if record["kind"] == "train":
                    done = (record["epoch"] - 1) * self.per_epoch + record["step"]
        return done

    def metrics(self):
        path = self.folder / "metrics.jsonl"
        return path.read_text() if path.exists() else ""

    def resumed_at(self):
        for line in self.life.output().splitlines():
            if " steps of " in line and "micro-batch(es)" in line:
                self.per_epoch = int(line.split(" steps of ")[0].split()[-1])
                if "resumed at epoch" not in line:
                    return 0
                words = line.split("resumed at epoch ")[1].split(";")[0].split()
                return (int(words[0]) - 1) * self.per_epoch + int(words[2])
        return None

    def wait(self, condition, seconds=60):
        """Whether the condition came true while ranks were alive and before the time was over."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.life.alive() or time.monotonic() > deadline:
                return condition()
            time.sleep(0.005)
        return True

    # ---- starts --------------------------------------------------------------------------------------------------

    def start(self, kind, before=None):
        worlds = [n for n in self.worlds if n != before and (n > 1 or kind != "stopped rank")]
        self.metrics_before = len(self.metrics())
        workers = self.draw.randint(1 if kind in ("killed loader process", "full shared memory") else 0, 3)
        world = self.draw.choice(worlds)
        argv = [*self.argv, f"--workers={workers}", f"--accumulate={self.micro_batches // world}"]
        self.life = Life(self.program, argv, world, self.log, is_piped=kind == "closed output")
        if not self.wait(lambda: self.resumed_at() is not None):
            self.wrong.append(f"{kind}: the ranks did not start\n{self.life.output()[-3000:]}")
        return self.resumed_at()

    def strike(self, kind, following):
        """One fault at a random moment, until the training has recovered from it and is ready for the following one."""
        entry, told = self.ledger[kind], len(self.wrong)
        if self.life is None:
            self.start(kind)
        goal = self.steps_done() + self.draw.randint(1, 6 if len(self.worlds) > 1 else 2)
        self.expect(kind, lambda: self.steps_done() >= goal, f"did not reach step {goal} before the fault")
        time.sleep(self.draw.uniform(0, 0.05))
        entry["injected"] += 1
        world, repair = self.life.world, self.inject(kind)
        done = self.steps_done()
        if late := self.life.end():
            self.wrong.append(f"{kind}: {len(late)} of {world} ranks hang\n{self.life.output()[-3000:]}")
        for path, content in repair:
            path.write_bytes(content)
        at = self.start(following, before=world if kind == "other number of ranks" else None)
        lost = max(0, done - (at or 0))
        if lost > LOSS[kind]:
            self.wrong.append(f"{kind}: {lost} steps lost, at most {LOSS[kind]} can be")
        entry["recovered"] += len(self.wrong) == told
        entry["lost"], entry["most"] = entry["lost"] + lost, max(entry["most"], lost)

    def expect(self, kind, condition, what):
        if not self.wait(condition):
            self.wrong.append(f"{kind}: {what}\n{self.life.output()[-3000:]}")

    def inject(self, kind):
        """Inject a fault; returns [(path, content)] to restore before the next start."""
        life, victim = self.life, self.draw.choice(self.life.pids)
        newest = self.folder / "checkpoint.pth.tar"
        if kind == "killed rank":
            children = children_of(victim)
            life.signal(signal.SIGKILL, [victim])
            self.expect_gone(kind, children)
        elif kind == "terminated rank":
            life.signal(self.draw.choice([signal.SIGTERM, signal.SIGUSR1]), [victim])
            self.ended_with(kind, {143})
        elif kind == "other number of ranks":
            life.signal(signal.SIGTERM)
            self.ended_with(kind, {143})
        elif kind == "stopped rank":
            life.signal(signal.SIGSTOP, [victim])
            rank = life.pids.index(victim)
            said = f"rank {rank} sends no heartbeat", f"rank {rank} never sent a heartbeat"
            self.expect(kind, lambda: any(words in life.output() for words in said), "was not reported")
            self.wait(lambda: life.alive() == [victim], 20)
            life.signal(signal.SIGKILL, [victim])
        elif kind == "killed loader process":
            children = children_of(victim)
            if not self.wait(lambda: children_of(victim) and True, 20):
                self.wrong.append(f"{kind}: there was none")
            children = children_of(victim)
            life.signal(signal.SIGKILL, [self.draw.choice(children)] if children else [victim])
            self.expect(kind, lambda: "a dataloader worker died" in life.output(), "was not reported")
        elif kind in ("torn checkpoint", "empty checkpoint"):
            previous = self.folder / "checkpoint.prev.pth.tar"
            self.expect(kind, previous.exists, "wrote no second checkpoint")  # the run starts again from that one
            life.signal(signal.SIGKILL)
            life.end()
            if newest.exists():
                # Not in place: the kept files may be the same one.
                content = newest.read_bytes()
                newest.unlink()
                # It is still empty where no step was saved since an earlier fault.
                is_torn = kind == "torn checkpoint" and len(content) > 1
                length = self.draw.randrange(1, len(content)) if is_torn else 0
                newest.write_bytes(content[:length])
        elif kind == "full disk":
            self.fill_disk(kind)
        elif kind == "full shared memory":
            self.fill_shared_memory(kind)
        elif kind == "closed output":
            if self.draw.random() < 0.5:
                life.signal(signal.SIGHUP, [victim])
            else:
                life.reader.kill()
            self.ended_with(kind, {143})
        elif kind == "two starts at once":
            self.start_two(kind)
        elif kind == "killed conversion":
            life.signal(signal.SIGTERM)  # first: a training beside it could reach its end
            self.ended_with(kind, {143})
            self.kill_conversion(kind)
        else:
            path = self.draw.choice(self.images)
            content = path.read_bytes()
            path.unlink() if kind == "deleted image" else path.write_bytes(content[: len(content) // 3])
            self.expect(kind, lambda: str(path) in life.output(), f"{path} was not named")
            return [(path, content)]
        return []

    def ended_with(self, kind, expected):
        if self.life.end() or set(self.life.statuses.values()) != expected:
            self.wrong.append(f"{kind}: statuses {self.life.statuses}\n{self.life.output()[-3000:]}")

    def expect_gone(self, kind, pids, seconds=10):
        """No process that a rank has started may outlive it."""
        deadline = time.monotonic() + seconds
        while (left := [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
            time.sleep(0.005)
        if left:
            self.wrong.append(f"{kind}: {len(left)} processes were left behind")

    def fill_shared_memory(self, kind):
        """All ranks end within 10 seconds, with one line."""
        ballast = pathlib.Path(processes.SHARED_MEMORY, "ballast")
        fill(ballast)
        late = self.life.end(10)
        ballast.unlink()
        lines = [line for line in self.life.output().splitlines() if line.startswith("error: ")]
        is_named = len(lines) == 1 and lines[0].startswith(f"error: {processes.SHARED_MEMORY}: ")
        if late or not is_named or set(self.life.statuses.values()) != {2}:
            self.wrong.append(f"{kind}: statuses {self.life.statuses}\n{self.life.output()[-3000:]}")

    def start_two(self, kind):
        """Start twice at once in the folder of the run: one wins, the other is refused and changes nothing."""
        self.life.signal(signal.SIGTERM)
        self.ended_with(kind, {143})
        world = self.life.world
        argv = [*self.argv, f"--workers={self.draw.randint(0, 3)}", f"--accumulate={self.micro_batches // world}"]
        lives = [Life(self.program, argv, world, self.log.with_name(f"chaos{n}.log")) for n in range(2)]
        deadline = time.monotonic() + 60
        while all(life.alive() for life in lives) and time.monotonic() < deadline:
            time.sleep(0.005)
        loser, self.life = sorted(lives, key=lambda life: len(life.alive()))
        late = loser.end(10)
        if late or set(loser.statuses.values()) != {2} or loser.output().count("error: ") != 1:
            self.wrong.append(f"{kind}: statuses {loser.statuses}\n{loser.output()[-3000:]}")
        self.metrics_before = len(self.metrics())
        self.expect(kind, lambda: self.resumed_at() is not None, "nobody won")
        goal = self.steps_done() + 1
        self.expect(kind, lambda: self.steps_done() >= goal, "the winner does not train")
        self.life.signal(signal.SIGTERM)
        self.ended_with(kind, {143})

    def kill_conversion(self, kind):
        """Kill preprocess.py while one worker hangs: nothing keeps its pipe open, and a second start ends the work."""
        source, target, whole = (self.log.with_name(name) for name in ("photos", "inputs", "inputs of one run"))
        words = [sys.executable, str(ROOT / "inception_v4" / "preprocess.py"), "--workers=2", "--image_size=75"]
        words.append(f"--src_path={source}")
        if not source.exists():
            shutil.copytree(self.data / "val" / "ant", source)
            subprocess.run([*words, f"--save_path={whole}"], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(target, ignore_errors=True)
        site = self.log.with_name("site")
        shutil.rmtree(site, ignore_errors=True)
        pipe, environment = slow_file(min(source.iterdir()), site)
        os.mkfifo(pipe)
        conversion = subprocess.Popen(
            [*words, f"--save_path={target}"], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        with open(pipe, "wb"):  # a worker has opened it
            time.sleep(self.draw.uniform(0, 0.02))
            conversion.send_signal(self.draw.choice([signal.SIGTERM, signal.SIGKILL]))
            try:
                conversion.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                self.wrong.append(f"{kind}: its output was not closed")
        done = subprocess.run([*words, f"--save_path={target}"], capture_output=True, text=True)
        contents = [{path.name: path.read_bytes() for path in folder.glob("*.bin")} for folder in (target, whole)]
        if contents[0] != contents[1]:
            self.wrong.append(f"{kind}: the second start did not complete the work\n{done.stdout}{done.stderr}")

    def fill_disk(self, kind):
        """Fill the disk until the run complains, then make room; the same ranks go on and save again."""
        life, ballast = self.life, self.folder / "ballast"
        fill(ballast)
        self.expect(kind, lambda: "cannot be written" in life.output(), "was not reported")
        ballast.unlink()
        goal = self.steps_done() + SAVE_EVERY + 1
        self.expect(kind, lambda: self.steps_done() >= goal, "ended the run")
        life.signal(signal.SIGTERM)
        self.ended_with(kind, {143})

    def finish(self):
        """Let the training come to its end."""
        if self.life.end(600) or set(self.life.statuses.values()) != {0}:
            self.wrong.append(f"the end: statuses {self.life.statuses}\n{self.life.output()[-3000:]}")

    def print_ledger(self):
        print(f"{'fault':24} {'injected':>8} {'recovered':>9} {'steps lost':>10} {'most':>5}")
        for kind, entry in [
            *self.ledger.items(),
            (
                "all",
                {
                    key: (max if key == "most" else sum)(one[key] for one in self.ledger.values())
                    for key in ("injected", "recovered", "lost", "most")
                },
            ),
        ]:
            print(f"{kind:24} {entry['injected']:8} {entry['recovered']:9} {entry['lost']:10} {entry['most']:5}")


def fill(ballast):
    """Write a file until its disk is full."""
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass


def children_of(pid):
    """Process ids of the children of a rank."""
    try:
        return [
            int(word)
            for task in pathlib.Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def on_small_disks():
    """Start this program again where it may mount disks of its own: in a user namespace."""
    if os.environ.get("CHAOS_NAMESPACE"):
        return
    words = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
    os.execvpe(words[0], words, {**os.environ, "CHAOS_NAMESPACE": "1"})


def slim(divisor):
    """Build every network of this process with that fraction of its channels: its layers and names, few numbers."""
    from torch import nn

    def few(number):  # neither 3 colors nor 3 classes are divided
        return number if number % divisor else number // divisor

    for layer, channel_arguments in ((nn.Conv2d, 2), (nn.BatchNorm2d, 1), (nn.Linear, 2)):

        def build(self, *sizes, original=layer.__init__, count=channel_arguments, groups=None, **more):
            more |= {} if groups is None else {"groups": few(groups)}
            original(self, *map(few, sizes[:count]), *sizes[count:], **more)

        layer.__init__ = build


def tame_weights(spec, home):
    """A file of weights whose activations keep their size: after a few steps the running statistics of batch norm do
    not yet fit the networks' own first weights, and validation overflows."""
    import torch

    torch.manual_seed(0)
    model = spec.build(num_classes=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(model.state_dict(), home / "start.pth")
    return home / "start.pth"


def prepare(model, faults, home):
    """(program, options, dataset root) of a training that is long enough for that many faults."""
    from support import draw_images

    if model == "tiny":
        from tiny import PROGRAM as program

        per_class, per_val = 20, 7
        # The limit of a hang is above the 5 s after which torch checks its dataloader workers.
        options = ["--batch-size=12", f"--epochs={4 + 5 * faults // 4}", "--hang-timeout=8"]
    else:
        program, per_class, per_val = models.program(model), 4, 1
        options = [
            f"--image-size={program.spec.min_size}",
            "--batch-size=4",
            f"--epochs={faults + 1}",
            "--num-classes=3",
            "--threads=1",
            "--device=cpu",
            "--lr=0.001",
            "--clip-grad=1",
            f"--pretrained={tame_weights(program.spec, home)}",
        ]
    draw_images(home / "data" / "train", ("ant", "bee", "cat"), per_class, size=96 if model != "tiny" else 40)
    draw_images(home / "data" / "val", ("ant", "bee", "cat"), per_val, seed=1)
    root = home / "data" / "train" if model == "xception" else home / "data"
    return program, [*options, *EVERYTHING, "--reduce=exact", f"--data={root}"], home / "data"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=["tiny", *models.names()])
    parser.add_argument("--faults", type=int, default=280)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slim", type=int, default=1, help="divide the channels of a real model by this")
    args = parser.parse_args()
    if args.model == "tiny":
        on_small_disks()
    with tempfile.TemporaryDirectory() as home:
        return run(args, pathlib.Path(home))


def run(args, home):
    os.environ.update(OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(home / "cache"))
    os.chdir(home)  # some programs write into the caller's folder
    began, draw = time.monotonic(), random.Random(args.seed)
    if args.slim > 1:
        slim(args.slim)
    program, options, data = prepare(args.model, args.faults, home)
    import torch._dynamo  # noqa: F401  what every optimizer imports; before the first fork
    import torchvision  # noqa: F401
    from support import run_differences

    import common.train.trainer  # noqa: F401

    (home / "disk").mkdir()
    if args.model == "tiny":
        for folder, size in ((home / "disk", DISK_MIB), (processes.SHARED_MEMORY, SHARED_MEMORY_MIB)):
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", folder], check=True)
    kinds = [KINDS[n % len(KINDS)] if args.model == "tiny" else KINDS[0] for n in range(args.faults)]
    draw.shuffle(kinds)
    # Micro-batches of a step: a number that every number of ranks divides.
    worlds, micro_batches = ((1, 2, 3), 6) if args.model == "tiny" else ((1,), 2)
    chaos = Chaos(program, options, home / "disk" / "run", data, draw, micro_batches, worlds)
    undisturbed = [*options, f"--output-dir={home / 'whole'}", f"--accumulate={micro_batches}"]
    whole = Life(program, undisturbed, 1, home / "whole.log")
    if whole.end(900) or set(whole.statuses.values()) != {0}:
        print(whole.output())
        return 1
    for number, (kind, following) in enumerate(zip(kinds, [*kinds[1:], "the end"], strict=True), 1):
        chaos.strike(kind, following)
        if number % 10 == 0:
            print(f"{number} of {len(kinds)} faults, {time.monotonic() - began:.0f} s", flush=True)
        if len(chaos.wrong) >= 5:
            break
    chaos.finish()
    chaos.print_ledger()
    different = run_differences(home / "whole", home / "disk" / "run") if not chaos.wrong else ["not compared"]
    if args.model == "tiny":
        subprocess.run(["umount", "-l", home / "disk"], check=True)
    shutil.rmtree(home / "disk", ignore_errors=True)
    for line in chaos.wrong:
        print("wrong:", line)
    print(
        f"{time.monotonic() - began:.0f} s; final weights, averages and momentum "
        + ("bit-equal to the undisturbed run's" if not different else f"DIFFER: {different[:5]}")
    )
    return 1 if different or chaos.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
