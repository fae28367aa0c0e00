"""The environment that launchers set for Ascend NPUs, with simulated CANN folders."""

import functools
import os
import subprocess
import sys

import pytest
from support import ROOT

from common.config import TrainConfig
from common.device import cann

MULTI = ROOT / "inception_v3" / "test" / "train_performance_multinodes.sh"
# Like CANN's own: reads variables that are not set, and has commands that fail.
SET_ENV = """export LD_LIBRARY_PATH={home}/lib64:$LD_LIBRARY_PATH
export PYTHONPATH={home}/python:$PYTHONPATH
export ASCEND_HOME_PATH={home}
test -n "$NO_SUCH_VARIABLE"
echo "a word of set_env.sh"
"""


# Takes the place of a training program; prints the environment of its process.
PROGRAM = """
import argparse, os
class PROGRAM:
    def parse(argv):
        parser = argparse.ArgumentParser()
        parser.add_argument("--rendezvous-timeout", type=int, default=600)
        return parser.parse_known_args(argv)[0], frozenset()
if __name__ == "__main__":
    print(*(f"{name}={value}" for name, value in os.environ.items()), sep="\\0", end="")
"""


@pytest.fixture
def start(tmp_path):
    """start(python, launcher, *words, **variables) -> {name: value} printed by the launcher, which uses `python`."""

    def start(python, launcher, *words, **variables):
        keep = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
        (tmp_path / "python").write_text(f"#!/bin/sh\n{python}\n")
        (tmp_path / "python").chmod(0o755)
        done = subprocess.run(
            ["bash", launcher, *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={"HOME": str(tmp_path), "PYTHON": str(tmp_path / "python")} | keep | variables,
        )
        return dict(entry.partition("=")[::2] for entry in done.stdout.split("\0") if entry)

    return start


@pytest.fixture
def environment(start):
    """environment(launcher, *words, **variables) -> the environment in which the launcher starts Python."""
    return functools.partial(start, "exec env -0")


@pytest.fixture
def rank_environment(start, tmp_path):
    """rank_environment(*words, **variables) -> the environment in which MULTI's launch.py starts a training program."""
    (tmp_path / "program.py").write_text(PROGRAM)
    python = f'launch=$1 name=$2; shift 3; exec "{sys.executable}" "$launch" "$name" "{tmp_path}/program.py" "$@"'
    return functools.partial(start, python, MULTI, "--devices=1", "--data_path=data")


def install(root, product):
    home = root / product / ("latest" if product != "cann" else "")
    home.mkdir(parents=True)
    (root / product / "set_env.sh").write_text(SET_ENV.format(home=home))
    return str(home)


@pytest.mark.skipif(os.path.exists("/usr/local/Ascend"), reason="this machine has CANN")
def test_without_cann_nothing_changes(environment, rank_environment, tmp_path):
    for start in (functools.partial(environment, MULTI), rank_environment):
        changed = start("--local_addr=10.0.0.7", ASCEND_INSTALL_PATH=str(tmp_path / "none"))
        names = ("HCCL", "TASK_QUEUE", "CPU_AFF", "LD_LIB", "COMBINED")
        assert changed and not [name for name in changed if name.startswith(names)]


@pytest.mark.parametrize("product", ["cann", "ascend-toolkit", "nnae"])
def test_every_layout_is_found_and_sourced(environment, tmp_path, product):
    home = install(tmp_path / "Ascend", product)
    found = environment(MULTI)
    assert found["ASCEND_HOME_PATH"] == home and found["LD_LIBRARY_PATH"].startswith(f"{home}/lib64")
    assert found["TASK_QUEUE_ENABLE"] == "2" and found["HCCL_WHITELIST_DISABLE"] == "1"


def test_the_newest_layout_wins_and_the_users_folder_before_it(environment, tmp_path):
    for product in ("nnae", "ascend-toolkit"):
        install(tmp_path / "Ascend", product)
    newest = install(tmp_path / "Ascend", "cann")
    own = install(tmp_path / "opt", "ascend-toolkit")
    assert environment(MULTI)["ASCEND_HOME_PATH"] == newest
    assert environment(MULTI, ASCEND_INSTALL_PATH=str(tmp_path / "opt"))["ASCEND_HOME_PATH"] == own
    sourced = environment(MULTI, ASCEND_HOME_PATH="/elsewhere")
    assert sourced["ASCEND_HOME_PATH"] == "/elsewhere" and "PYTHONPATH" not in sourced
    assert sourced["TASK_QUEUE_ENABLE"] == "2"


def test_hccls_address_and_timeout_are_those_of_the_launchers_keys(rank_environment, tmp_path):
    install(tmp_path / "Ascend", "cann")
    for given, seconds in (
        (["--rendezvous_timeout=60"], "120"),
        (["--rendezvous-timeout=900"], "900"),
        (["--rendezvous-timeout=99999"], "7200"),
        (["--", "--rendezvous-timeout=800"], "800"),
        ([], "600"),
    ):
        found = rank_environment("--local_addr=10.0.0.6", "--local-addr=10.0.0.7", *given)
        assert (found["HCCL_IF_IP"], found["HCCL_CONNECT_TIMEOUT"]) == ("10.0.0.7", seconds)
    assert "HCCL_IF_IP" not in rank_environment(), "without --local_addr HCCL chooses"
    assert "HCCL_IF_IP" not in rank_environment("--local_addr=10.0.0.7", HCCL_SOCKET_IFNAME="eth1")


def test_the_task_queue_is_off_while_debugging(environment, tmp_path):
    install(tmp_path / "Ascend", "cann")
    assert "TASK_QUEUE_ENABLE" not in environment(MULTI, ASCEND_LAUNCH_BLOCKING="1")


def test_the_default_timeout_is_the_training_programs():
    assert TrainConfig().rendezvous_timeout == 600


def test_what_the_user_set_stays(rank_environment, tmp_path):
    install(tmp_path / "Ascend", "cann")
    own = dict(
        HCCL_IF_IP="10.9.9.9",
        HCCL_CONNECT_TIMEOUT="300",
        TASK_QUEUE_ENABLE="0",
        CPU_AFFINITY_CONF="2",
        COMBINED_ENABLE="",
        ASCEND_GLOBAL_LOG_LEVEL="1",
        HCCL_WHITELIST_DISABLE="0",
        ASCEND_SLOG_PRINT_TO_STDOUT="1",
        ASCEND_GLOBAL_EVENT_ENABLE="1",
    )
    found = rank_environment("--local_addr=10.0.0.7", **own)
    assert {name: found[name] for name in own} == own


def test_cores_are_bound_where_the_job_has_all_of_them(environment, tmp_path):
    install(tmp_path / "Ascend", "cann")
    assert environment(MULTI, OMP_NUM_THREADS="1").get("CPU_AFFINITY_CONF") == (
        "1" if len(os.sched_getaffinity(0)) == os.cpu_count() else None
    )
    own = os.sched_getaffinity(0)
    if os.cpu_count() > 1:
        os.sched_setaffinity(0, {min(own)})  # inherited by the launcher
        try:
            assert "CPU_AFFINITY_CONF" not in environment(MULTI)
        finally:
            os.sched_setaffinity(0, own)


def test_the_drivers_libraries_are_found_once(environment, tmp_path):
    install(tmp_path / "Ascend", "cann")
    library = tmp_path / "Ascend" / "driver" / "lib64" / "driver"
    library.mkdir(parents=True)
    here = dict(ASCEND_INSTALL_PATH=str(tmp_path / "Ascend"))
    assert environment(MULTI, **here)["LD_LIBRARY_PATH"].split(":")[-1] == str(library)
    again = environment(MULTI, LD_LIBRARY_PATH=f"{library}:/usr/lib", **here)["LD_LIBRARY_PATH"]
    assert again.split(":").count(str(library)) == 1


def test_scripts_without_the_launcher_have_the_environment_too(environment, tmp_path):
    home = install(tmp_path / "Ascend", "cann")
    script = ROOT / "xception" / "scripts" / "run_eval.sh"
    assert environment(script, "0", "data", "file.ckpt")["ASCEND_HOME_PATH"] == home


def test_the_remedy_for_a_missing_cann_names_the_set_env_that_launchers_source(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_INSTALL_PATH", str(tmp_path / "Ascend"))
    install(tmp_path / "Ascend", "nnae")
    assert cann.how_to_source() == f"run `source {tmp_path}/Ascend/nnae/set_env.sh` first"
    install(tmp_path / "Ascend", "cann")
    assert cann.how_to_source() == f"run `source {tmp_path}/Ascend/cann/set_env.sh` first"
