"""common/processes.py: no process is left behind, whatever ends the one that started it."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from support import ROOT, all_gone, draw_images, processes_naming, slow_file, wait_until, write_pooling_onnx

from common import processes

PREFIX = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom common import parallel, processes\n"
# Starts another program and then waits, as atc does with its compilers; $0 is a folder that holds the program `sleep`.
NESTED = '"$0"/sleep 1000 & echo started; "$0"/sleep 1000'


@pytest.fixture(autouse=True)
def _named_sleep(tmp_path):
    """A `sleep` whose command line names the folder of the test."""
    (tmp_path / "sleep").symlink_to(shutil.which("sleep"))


def started(words, **options):
    """A program whose output is read through a pipe, as a supervisor does."""
    return subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def ends_with_everything(process, number, name):
    """Signal a program; its pipe must end, and no process that names `name` may be left."""
    process.send_signal(number)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == -number, output
    assert all_gone(name, 10), "a process was left behind"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
@pytest.mark.usefixtures("foreground_signals")
def test_a_program_and_its_children_end_with_the_one_that_started_it(tmp_path, number):
    code = f"with processes.program(['sh', '-c', {NESTED!r}, {str(tmp_path)!r}]) as program: program.wait()"
    process = started([sys.executable, "-c", PREFIX + code])
    assert process.stdout.readline() == b"started\n"
    ends_with_everything(process, number, tmp_path)


@pytest.mark.parametrize("ends", ["exit 3", "kill -KILL $$"])
def test_children_that_a_program_leaves_end_with_it_though_they_hold_its_pipe(tmp_path, ends):
    done = processes.run_program(["sh", "-c", f'"$0"/sleep 1000 & echo told >&2; {ends}', str(tmp_path)])
    assert done.returncode == (3 if ends == "exit 3" else 128 + signal.SIGKILL) and done.stdout.startswith("told\n")
    assert all_gone(tmp_path, 10)


def test_an_interrupted_block_ends_its_program(tmp_path):
    words = ["sh", "-c", NESTED, str(tmp_path)]
    with pytest.raises(KeyboardInterrupt), processes.program(words, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "started\n" and len(processes_naming(tmp_path)) > 1
        raise KeyboardInterrupt
    assert all_gone(tmp_path, 10)


def test_a_process_whose_parent_is_already_dead_gets_the_signal_at_once():
    code = f"import signal; processes.die_with_parent({os.getpid() + 10**6}, signal.SIGUSR1)"
    assert subprocess.run([sys.executable, "-c", PREFIX + code]).returncode == -signal.SIGUSR1


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """A pipe; the first image of train/ant is read after somebody has opened it to write and closed it."""
    draw_images(tmp_path / "train", ("ant", "bee"), 20)
    pipe, environment = slow_file(tmp_path / "train" / "ant" / "0000.jpg", tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    os.mkfifo(pipe)
    return pipe


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_workers_of_preprocess_end_with_it(tmp_path, hanging, number):
    words = [
        ROOT / "inception_v4" / "preprocess.py",
        "--src_path",
        tmp_path / "train" / "ant",
        "--save_path",
        tmp_path / "out",
    ]
    process = started([sys.executable, *words, "--workers=2"])
    with open(hanging, "wb"):  # a worker has opened it
        ends_with_everything(process, number, tmp_path / "out")


@pytest.mark.usefixtures("foreground_signals")
def test_an_interrupt_does_not_wait_for_a_worker_that_hangs(tmp_path, hanging):
    words = [
        ROOT / "inception_v4" / "preprocess.py",
        "--src_path",
        tmp_path / "train" / "ant",
        "--save_path",
        tmp_path / "out",
    ]
    process = started([sys.executable, *words, "--workers=2"])
    with open(hanging, "wb"):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stdout.read() == b""
    assert all_gone(tmp_path / "out", 10)


def test_what_atc_started_ends_with_run_atc(tmp_path):
    write_pooling_onnx(tmp_path / "net.onnx")
    (tmp_path / "atc").write_text(f"#!/bin/sh\n{tmp_path}/sleep 1000 &\ntouch {tmp_path}/up; {tmp_path}/sleep 1000\n")
    (tmp_path / "atc").chmod(0o755)
    words = [ROOT / "tools" / "run_atc.py", "--model", tmp_path / "net.onnx", "--soc-version=Ascend310P3"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = started([sys.executable, *words], cwd=tmp_path, env={**os.environ, "PATH": path})
    wait_until((tmp_path / "up").exists, process)
    ends_with_everything(process, signal.SIGKILL, tmp_path)


def test_a_query_ends_with_the_program_that_asked(tmp_path):
    (tmp_path / "npu-smi").write_text(f"#!/bin/sh\ntouch {tmp_path}/up; exec {tmp_path}/sleep 1000\n")
    (tmp_path / "npu-smi").chmod(0o755)
    code = PREFIX + "from common.device import npu_smi\nnpu_smi._npu_smi('info')"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    process = started([sys.executable, "-c", code], env={**os.environ, "PATH": path})
    wait_until((tmp_path / "up").exists, process)
    ends_with_everything(process, signal.SIGKILL, tmp_path)
