"""Signals to one rank; ranks that die or hang; nodes that leave and join: no step is lost, no process hangs."""

import concurrent.futures
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image
from support import (
    LAUNCH_TINY,
    ROOT,
    TINY,
    all_gone,
    background,
    final,
    metrics_of,
    pending_signals,
    processes_naming,
    run_differences,
    run_program,
    send_delivered,
    slow_file,
    wait_until,
)
from tiny import PROGRAM, SPEC

from common import errors
from common.data import index, loader, transforms
from common.errors import UserError
from common.launch import launch
from common.ports import bind_error
from common.train import signals

OPTIONS = ["--print-freq=1", "--save-every=3", "--epochs=4", "--reduce=exact", "--ema=0.9"]
MANY = "--epochs=4000"


def command(images, folder, *keys, options=OPTIONS):
    return [
        str(word)
        for word in (
            sys.executable,
            *LAUNCH_TINY,
            f"--data_path={images}",
            "--device=cpu",
            "--batch_size=12",
            f"--output_dir={folder}",
            *keys,
            "--",
            *options,
        )
    ]


class Started:
    """A running command and its output; killed at the end of the test."""

    def __init__(self, words, folder, tmp_path):
        self.folder, self._output = folder, tmp_path / f"output of {time.monotonic_ns()}"
        with open(self._output, "w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words], cwd=tmp_path, stdout=file, stderr=file, start_new_session=True
            )

    def output(self):
        return self._output.read_text()

    def steps(self):
        metrics = self.folder / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def does_steps(self, number=3):
        """Return when that many more lines are in the metrics."""
        goal = self.steps() + number
        wait_until(lambda: self.steps() >= goal, self.process, self.output)

    def says(self, words):
        wait_until(lambda: words in self.output(), self.process, self.output)

    def ranks(self):
        """Process ids of the ranks; in the order they were started, for those of one launcher."""
        return sorted(
            pid
            for pid in processes_naming(self.folder)
            if pid != self.process.pid and b"launch.py" not in open(f"/proc/{pid}/cmdline", "rb").read()
        )  # noqa: SIM115

    def ends(self, status):
        assert self.process.wait(timeout=120) == status, self.output()
        assert all_gone(self.folder), "a process was left behind"
        return self.output()


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(words, folder):
        started.append(Started(words, folder, tmp_path))
        return started[-1]

    yield begin
    for one in started:
        for pid in processes_naming(one.folder):
            os.kill(pid, signal.SIGKILL)
        one.process.wait()


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert background(*command(images, folder, options=[*OPTIONS, "--accumulate=6"]), cwd=folder.parent).wait(120) == 0
    return folder


def test_a_signal_to_workers_that_are_just_starting_does_not_end_them(images, monkeypatch):
    """A scheduler signals every process of the job, here before the workers ignore the signal."""
    begin = loader._init_worker

    def signalled(worker_id):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        begin(worker_id)

    monkeypatch.setattr(loader, "_init_worker", signalled)
    val = index.load_splits(str(images)).val
    batches = loader.EvalLoader(val, transforms.eval_transform(SPEC, 32), 7, "fail", 0, 1, 2, False)
    assert [len(batch.labels_N) for batch in batches] == [7, 7, 7]
    assert all(worker.is_alive() for worker in batches._loader._iterator._workers)
    batches.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "the trainer would not hear its signals"


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_rank_stops_all_at_the_same_saved_step(images, start, tmp_path, number, rank):
    folder = tmp_path / "run"
    run = start(command(images, folder, "--devices=2", options=[*OPTIONS, MANY, "--save-every=0"]), folder)
    run.does_steps()
    os.kill(run.ranks()[rank], number)
    output = run.ends(errors.EXIT_TERMINATED)
    state, last = final(folder), [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"stopped at epoch {state['epoch'] + 1} step {state['step']};" in output
    done = [(last["epoch"] - 1, last["step"]), (last["epoch"], 0)]
    assert (state["epoch"], state["step"]) in done, "it saved another step than the last one"


def test_a_second_interrupt_leaves_at_once_also_while_another_rank_hangs(images, start, tmp_path):
    folder = tmp_path / "run"
    run = start(command(images, folder, "--devices=2", options=[*OPTIONS, MANY]), folder)
    run.does_steps()
    stopped, other = run.ranks()
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(0.5)  # the other one now waits for it, in the middle of a collective
    send_delivered(other, signal.SIGINT)
    time.sleep(0.3)
    assert other in run.ranks(), "the first interrupt did not wait for the step"
    os.kill(other, signal.SIGINT)
    wait_until(lambda: other not in run.ranks(), output=run.output)


def test_killed_ranks_start_again_and_nothing_is_lost(images, start, tmp_path, undisturbed):
    """Several restarts in a row: ranks must not find keys of an earlier round in the store."""
    folder = tmp_path / "run"
    options = [*OPTIONS, "--accumulate=3"]
    run = start(command(images, folder, "--devices=2", "--max_restarts=3", options=options), folder)
    for rank in (0, 1, 1):
        run.does_steps(4)
        os.kill(run.ranks()[rank], signal.SIGKILL)
        run.says("was ended by SIGKILL")
    output = run.ends(0)
    assert output.count("all ranks start again from the last saved step") == 3 and output.count("resumed at") == 3
    assert "Traceback" not in output
    assert run_differences(undisturbed, folder) == []


@pytest.mark.parametrize(("options", "status"), [(["--lr=-1"], 2), ([MANY], errors.EXIT_TERMINATED)])
def test_wrong_input_and_a_stop_are_not_restarted(images, start, tmp_path, options, status):
    folder = tmp_path / "run"
    run = start(command(images, folder, "--devices=2", "--max_restarts=3", options=[*OPTIONS, *options]), folder)
    if status == errors.EXIT_TERMINATED:
        run.does_steps()
        os.kill(run.ranks()[1], signal.SIGTERM)
    assert "start again" not in run.ends(status)


# The launcher, with a shorter wait for nodes beyond the minimum.
HASTY_LAUNCHER = """
import sys
sys.path.insert(0, {root!r})
from common.launch import elastic, launch
elastic._LAST_CALL_S = 2
launch.main(sys.argv[1:])
"""


def test_nodes_leave_and_join_during_a_run(images, start, tmp_path):
    """Two nodes, then one, then two again: the images of a step and their micro-batches stay the same."""
    # Below the ports that Linux gives to outgoing connections, which may take one at any moment.
    folder, port = tmp_path / "run", next(p for p in range(20000 + os.getpid() % 12000, 32768) if not bind_error(p))
    launcher = tmp_path / "launch.py"
    launcher.write_text(HASTY_LAUNCHER.format(root=str(ROOT)))
    keys = ["--nnodes=1:3", f"--master_port={port}", "--local_addr=127.0.0.1"]

    def machine(number):
        # Four images and two micro-batches per node: twelve images and six micro-batches with all three nodes.
        words = command(
            images, folder, *keys, "--batch_size=4", f"--node_rank={number}", options=[*OPTIONS, "--accumulate=2", MANY]
        )
        words[1] = launcher
        return start(words, folder)

    first, second = machine(0), machine(1)
    first.says("2 rank(s)")
    first.does_steps()
    second.process.kill()
    first.says("1 rank(s)")
    first.does_steps()
    third = machine(2)
    # Either of the two may be the one that prints.
    wait_until(
        lambda: "2 rank(s)" in first.output().split("1 rank(s)")[-1] + third.output(), first.process, first.output
    )
    first.does_steps()
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(60) == errors.EXIT_TERMINATED, first.output()
    state = final(folder)
    assert (state["num_micro_batches"], state["micro_batch_size"]) == (6, 2)


def test_a_rank_that_hangs_is_named_and_ends_the_run(images, start, tmp_path):
    folder = tmp_path / "run"
    run = start(command(images, folder, "--devices=2", options=[*OPTIONS, MANY, "--hang-timeout=3"]), folder)
    run.does_steps(10)
    time.sleep(1)  # three heartbeats
    stopped = run.ranks()[1]
    os.kill(stopped, signal.SIGSTOP)
    run.says("rank 1 sends no heartbeat, last phase: ")
    # The agent has seen the end of rank 0 once it has signalled the stopped rank, for which it would wait.
    wait_until(lambda: pending_signals(stopped), run.process, run.output)
    os.kill(stopped, signal.SIGKILL)
    output = run.ends(1)
    assert "error: no progress for 3 s (--hang-timeout 3)" in output
    assert "last image " in output.split("no heartbeat")[1] and "Traceback" not in output


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_worker_that_hangs_in_a_read_is_named_with_its_image(
    images, start, tmp_path, workers, monkeypatch
):
    folder, data = tmp_path / "run", tmp_path / "data"
    subprocess.run(["cp", "-r", images, data], check=True)
    words = [
        sys.executable,
        TINY,
        "--data",
        data,
        "--output-dir",
        folder,
        f"--workers={workers}",
        MANY,
        "--print-freq=1",
        "--hang-timeout=2",
    ]
    hanging = data / "train" / "bee" / "0007.jpg"
    pipe, environment = slow_file(hanging, tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    run = start(words, folder)
    run.does_steps()
    os.mkfifo(pipe)  # nobody writes into it: open() waits for ever
    output = run.ends(1)
    assert "rank 0 is loading images for 2 s" in output and f"reading {hanging}" in output


def test_a_killed_dataloader_worker_ends_the_run_with_one_line(images, start, tmp_path):
    folder = tmp_path / "run"
    run = start(
        [sys.executable, TINY, "--data", images, "--output-dir", folder, "--workers=2", MANY, "--print-freq=1"], folder
    )
    run.does_steps()
    os.kill(max(processes_naming(folder)), signal.SIGKILL)
    output = run.ends(1)
    assert "error: a dataloader worker died" in output and "Traceback" not in output


def test_a_worker_whose_trainer_ended_prints_nothing_but_other_errors_are_printed(capsys):
    for error in (ConnectionResetError(), EOFError(), ValueError("told")):
        loader._worker_excepthook(type(error), error, None)
    assert capsys.readouterr().err == "ValueError: told\n"


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_the_wait_for_an_image(images, tmp_path, monkeypatch, workers, split):
    """Saved at the step that waits: the read of a dead network disk takes as long as it takes."""
    folder, data = tmp_path / "run", tmp_path / "data"
    subprocess.run(["cp", "-r", images, data], check=True)
    pipe, _ = slow_file(data / split / "bee" / "0003.jpg", tmp_path / "site")
    monkeypatch.setattr(os, "open", os.open)  # taken back at the end
    exec((tmp_path / "site" / "sitecustomize.py").read_text(), {})  # workers are forked
    os.mkfifo(pipe)

    def terminate():
        with open(pipe, "wb"):  # returns when somebody opens it to read
            time.sleep(0.3)  # until the trainer has used the batches before it
            os.kill(os.getpid(), signal.SIGTERM)
            ended.wait(60)

    ended, thread = threading.Event(), threading.Thread(target=terminate)
    thread.start()
    try:
        with pytest.raises(SystemExit) as end:
            PROGRAM.main([f"--data={data}", f"--output-dir={folder}", f"--workers={workers}", "--print-freq=1"])
    finally:
        ended.set()
        thread.join()
    assert end.value.code == errors.EXIT_TERMINATED
    done = len(metrics_of(folder))
    assert (final(folder)["epoch"], final(folder)["step"]) == (0, done)
    assert (done == 5) == (split == "val"), "it was not in the phase that is tested"


@pytest.mark.usefixtures("foreground_signals")
def test_a_terminal_that_is_closed_stops_the_run_at_a_saved_step(images, tmp_path):
    """A dropped ssh session: SIGHUP, and a terminal that takes no more output."""
    folder = tmp_path / "run"
    words = [sys.executable, TINY, "--data", images, "--output-dir", folder, MANY, "--print-freq=1"]
    pid, terminal = pty.fork()
    if not pid:
        os.execv(words[0], [str(word) for word in words])
    wait_until(lambda: len(metrics_of(folder)) > 2)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    state, log = final(folder), (folder / "log.txt").read_text()
    assert os.waitstatus_to_exitcode(status) == errors.EXIT_TERMINATED, log
    assert log.endswith(f"stopped at epoch {state['epoch'] + 1} step {state['step']}; --resume auto continues there\n")


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt = signals.Interrupt()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and not interrupt
        interrupt.close()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_standard_output_that_nobody_reads_stops_the_run_at_a_saved_step(images, tmp_path):
    folder = tmp_path / "run"
    words = [sys.executable, TINY, "--data", images, "--output-dir", folder, MANY, "--print-freq=1"]
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=stderr)
    assert process.stdout.readline().startswith(b"tiny: ")
    process.stdout.close()
    status, log = process.wait(60), (folder / "log.txt").read_text()
    assert (status, (tmp_path / "stderr").read_text()) == (errors.EXIT_TERMINATED, ""), log
    state = final(folder)
    assert log.splitlines()[-2:] == [
        "standard output was closed: the run saves and ends",
        f"stopped at epoch {state['epoch'] + 1} step {state['step']}; --resume auto continues there",
    ]
    assert state["step"] == metrics_of(folder)[-1]["step"] % 5


def test_an_error_of_all_loaders_is_one_line_and_ends_all_ranks(images, start, tmp_path, monkeypatch):
    """A temporary folder whose path is too long for the sockets of the workers."""
    temporary, folder = tmp_path / ("x" * 80), tmp_path / "run"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    run = start(command(images, folder, "--devices=2", "--max_restarts=2", options=["--workers=2"]), folder)
    output = run.ends(2)
    found = [line for line in output.splitlines() if "micro-batch(es)" not in line]
    assert len(found) == 1 and found[0].startswith(f"error: TMPDIR: {temporary} has"), output


def test_nan_in_validation_is_one_line_and_is_not_restarted(images, start, tmp_path):
    folder = tmp_path / "run"
    options = ["--lr=1e30", "--epochs=1", "--workers=0"]  # the only step of the epoch: its loss is finite
    run = start(command(images, folder, "--devices=2", "--max_restarts=2", "--batch_size=60", options=options), folder)
    output = run.ends(1)
    assert output.count("error:") == 1 and "the logits of validation images are NaN" in output
    assert "start again" not in output and "Traceback" not in output


def test_an_unexpected_error_of_all_ranks_is_printed_once_also_where_they_start_again(images, start, tmp_path):
    """Before there is a process group, as that of a broken driver."""
    script, folder = tmp_path / "broken.py", tmp_path / "run"
    script.write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}, {str(TINY.parent)!r}]\n"
        "from common.device import device\nfrom tiny import PROGRAM\n"
        "def choose(*_):\n    raise RuntimeError('the driver is broken')\n"
        "if 'WORLD_SIZE' in os.environ:\n    device.choose = choose\n"
        "if __name__ == '__main__':\n    PROGRAM.main()\n"
    )
    words = [
        str(script) if word == str(TINY) else word
        for word in command(images, folder, "--devices=2", "--max_restarts=1")
    ]
    output = start(words, folder).ends(1)
    assert output.count("Traceback") == output.count("the driver is broken") // 2 == 1, output
    assert output.count("all ranks start again") == 1


@pytest.mark.parametrize("is_launched", [True, False])
def test_a_package_that_is_missing_is_one_line_for_all_ranks(images, start, tmp_path, monkeypatch, is_launched):
    """Of a launcher's ranks the first one prints it; of those that torchrun starts, the one with local rank 0."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "tqdm.py").write_text("raise ModuleNotFoundError('no tqdm', name='tqdm')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    words = command(images, tmp_path / "run", "--devices=2", "--max_restarts=1")
    if not is_launched:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", TINY]
        words += ["--data", images, "--device=cpu"]
    output = start(words, tmp_path / "run").ends(2 if is_launched else 1)
    lines = [line for line in output.splitlines() if is_launched or "error: " in line]
    assert lines == [
        f"error: {sys.executable}: the Python package tqdm is not installed; run `make venv`, or `pip install -r "
        "requirements.txt` in your own environment"
    ]


def test_workers_that_hang_die_with_their_trainer(images, start, tmp_path, monkeypatch):
    folder, data = tmp_path / "run", tmp_path / "data"
    subprocess.run(["cp", "-r", images, data], check=True)
    pipe, environment = slow_file(data / "train" / "bee" / "0007.jpg", tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    os.mkfifo(pipe)
    run = start([sys.executable, TINY, "--data", data, "--output-dir", folder, "--workers=2"], folder)
    with open(pipe, "wb"):  # a worker has opened it
        run.process.kill()
        run.ends(-signal.SIGKILL)


def test_a_number_of_nodes_may_be_a_range():
    for text, nodes in (("3", (3, 3)), ("2:4", (2, 4))):
        config = launch.parse_keys(["--nnodes=1"], [f"--nnodes={text}"])
        assert (config.min_nodes, config.max_nodes, config.is_elastic) == (*nodes, text == "2:4")
    for text in ("4:2", "0", "0:2"):
        with pytest.raises(UserError, match=f"--nnodes: {text}, MIN must be at least 1 and at most MAX"):
            launch.parse_keys([], [f"--nnodes={text}"])
    for text in ("", "two", "1:", "1:2:3", "-1"):
        with pytest.raises(UserError, match=f"--nnodes: {text}, must be a number of nodes or MIN:MAX"):
            launch.parse_keys([], [f"--nnodes={text}"])
    with pytest.raises(UserError, match="--resume: x.pth, with --max_restarts"):
        launch.restart_arguments(launch.LaunchConfig(max_restarts=1), PROGRAM, ["--resume=x.pth"])


def two_ranks(site, *words):
    """Two ranks of the tiny network, rank 1 with the modules in `site` before all others; [finished process]."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def rank(number):
        env = {key: str(value) for key, value in {**world, "RANK": number, "LOCAL_RANK": number}.items()}
        return run_program(TINY, *words, env={**env, "PYTHONPATH": str(site) if number else ""}, check=None)

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        return list(threads.map(rank, (0, 1)))


def test_ranks_that_decode_other_pixels_are_refused(images, tmp_path):
    """A node whose JPEG library reads other pixels than PIL's takes PIL; then all must."""
    (tmp_path / "simplejpeg.py").write_text("def decode_jpeg(data, strict):\n    raise ValueError('other version')\n")
    words = ["--data", images, "--output-dir", tmp_path / "run", "--max-steps=2", "--reduce=exact"]
    done = two_ranks(tmp_path, *words)
    assert [each.returncode for each in done] == [2, 2], done[0].stderr + done[1].stderr
    (line,) = [line for each in done for line in each.stderr.splitlines() if line.startswith("error: ")]
    found = rf"error: --decoder: rank 1 has pil {re.escape(Image.__version__)}, rank 0 has fast [0-9a-f]{{8}}; install "
    assert re.match(found, line) and line.endswith("or give --decoder pil")
    assert not (tmp_path / "run" / "checkpoint.pth.tar").exists()
    done = two_ranks(tmp_path, *words, "--decoder=pil")
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr


def test_a_rank_without_simplejpeg_decodes_the_same_pixels(images, tmp_path):
    (tmp_path / "simplejpeg.py").write_text("raise ImportError\n")
    words = ["--data", images, "--max-steps=7", "--reduce=exact", "--accumulate=2"]
    PROGRAM.main([*map(str, words), f"--output-dir={tmp_path / 'one'}"])
    done = two_ranks(tmp_path, *words, "--accumulate=1", f"--output-dir={tmp_path / 'two'}")
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    assert not run_differences(tmp_path / "one", tmp_path / "two")
