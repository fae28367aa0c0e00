"""Two nodes in two network namespaces with a veth pair: correct ones train, mistakes are reported in one line."""

import concurrent.futures
import functools
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from support import ROOT, TINY, npu_environment, npu_site, run_differences, user_error
from torch import distributed as dist

from common.errors import UserError
from common.launch import rendezvous

PORT = 29400
OPTIONS = ["--print-freq=1", "--epochs=2", "--warm-up-steps=2", "--reduce=exact"]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


class Machines:
    """Two namespaces with one address each; `start` runs a launcher in one of them."""

    def __init__(self, names, images):
        self.names, self.images, self.addresses = names, images, ("10.77.0.1", "10.77.0.2")

    def start(self, rank, *, root=ROOT, data=None, cwd, device="cpu", environment=(), **given):
        """Start the launcher on machine `rank`; `given` overrides its keys."""
        keys_of_machine = dict(
            nnodes=2,
            node_rank=rank,
            local_addr=self.addresses[rank],
            device=device,
            master_addr=self.addresses[0],
            master_port=PORT,
            batch_size=6,
            rendezvous_timeout=60,
        )
        words = [f"--{key}={value}" for key, value in (keys_of_machine | given).items()]
        command = [
            "ip",
            "netns",
            "exec",
            self.names[rank],
            sys.executable,
            root / "common" / "launch" / "launch.py",
            "tiny",
            root / "tests" / "tiny.py",
            "--",
            "--",
            f"--data_path={data or self.images}",
            *words,
            "--",
            *OPTIONS,
        ]
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment),
        )


def finished(process, seconds=100):
    """(exit status, stdout, stderr) of a launcher."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"a launcher hangs: {process.communicate()}") from None
    return process.returncode, out, err


@pytest.fixture(scope="module")
def machines(images):
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    assert shutil.which("ip"), "the program ip is missing: apt-get install iproute2"
    names = [f"zoo{os.getpid()}{side}" for side in "ab"]
    ends = [f"z{os.getpid()}{side}" for side in "ab"]
    steps = [["netns", "add", name] for name in names]
    steps += [["link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1]]]
    for name, end, address in zip(names, ends, ("10.77.0.1", "10.77.0.2"), strict=True):
        steps += [
            ["-n", name, "addr", "add", f"{address}/24", "dev", end],
            ["-n", name, "link", "set", end, "up"],
            ["-n", name, "link", "set", "lo", "up"],
        ]
    try:
        for step in steps:
            done = ip(*step)
            assert done.returncode == 0, (step, done.stderr)
        yield Machines(names, images)
    finally:
        for name in names:
            ip("netns", "del", name)


def losses(folder):
    """Losses and accuracies of a run at full precision, in order."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("time", "fps")} for record in records]


@pytest.fixture
def hardware(device, tmp_path):
    """Environment of the programs: nothing for a CPU with gloo, the simulated torch_npu for an NPU with hccl."""
    if device == "cpu":
        return {}
    (tmp_path / "site").mkdir()
    return npu_environment(npu_site(tmp_path / "site"))


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_two_nodes_train_to_the_bits_of_one_process(machines, images, run, tmp_path, device, hardware):
    """Equal micro-batches: one process accumulates those that the ranks of both nodes share."""
    one, two = tmp_path / "one", tmp_path / "two"
    keys = ("--output-dir", one, "--batch-size=12", "--accumulate=4", f"--device={device}", *OPTIONS)
    run(TINY, "--data", images, *keys, env=hardware)
    start = functools.partial(machines.start, device=device, environment=hardware, output_dir=two, cwd=tmp_path)
    ranks = [start(r, devices=2) for r in (0, 1)]
    (status0, out0, err0), (status1, out1, err1) = (finished(rank) for rank in ranks)
    assert (status0, status1, err0, err1) == (0, 0, "", "")
    of_one, of_two = losses(one), losses(two)
    assert len(of_two) == 2 * (5 + 1)
    for a, b in zip(of_one, of_two, strict=True):
        if a["kind"] == "val":  # the ranks' batches are smaller, and some processors round a smaller batch differently
            assert a.pop("loss") == pytest.approx(b.pop("loss"), rel=1e-7)
    assert of_one == of_two
    assert run_differences(one, two) == []
    summary = json.loads((two / "summary.json").read_text())
    speeds = summary["images_per_s_of_machines"]
    assert len(speeds) == 2 and min(speeds) > 0 and summary["images_per_s"] == sum(speeds)
    # Each node prints its own throughput once, node 0 also the sum.
    assert out0.count(f"machine 0 of 2: {speeds[0]:.3f} images/sec") == 1 and "machine 1 of 2" not in out0
    assert out1.strip() == f"machine 1 of 2: {speeds[1]:.3f} images/sec"
    assert out0.count(f"Final Performance images/sec : {sum(speeds):.3f}") == 1


def mistake(process):
    """The one line that a launcher ended with; no rank was started."""
    status, out, err = finished(process)
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, (status, out, err)
    return err.removeprefix("error: ").strip()


def test_a_wrong_address_and_a_node_that_never_joins(machines, tmp_path):
    alone = machines.start(0, rendezvous_timeout=3, cwd=tmp_path)
    lost = machines.start(1, rendezvous_timeout=3, master_addr="10.77.0.9", cwd=tmp_path)
    assert mistake(alone).startswith("--rendezvous-timeout: node 1 of 2 did not join at 10.77.0.1:29400 within 3 s; ")
    assert mistake(lost).startswith("--master_addr: node 0 does not answer at 10.77.0.9:29400 within 3 s (")


def test_addresses_of_other_nodes(machines, tmp_path):
    elsewhere = machines.start(0, master_addr="10.77.0.2", rendezvous_timeout=3, cwd=tmp_path)
    foreign = machines.start(1, local_addr="10.77.0.3", cwd=tmp_path)
    assert mistake(elsewhere).startswith(
        "--master_addr: 10.77.0.2 does not lead to this node, which is node 0 (Connection refused); it has 10.77.0.1"
    )
    assert mistake(foreign).startswith("--local_addr: 10.77.0.3 is no address of this node; it has 10.77.0.2 (z")


def test_an_occupied_port(machines, tmp_path):
    """Node 0 reports it at once; node 1 reports that something else answers there."""
    words = ["ip", "netns", "exec", machines.names[0], sys.executable, "-u", "-m", "http.server", str(PORT)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout.readline().startswith("Serving HTTP")
        zero = machines.start(0, cwd=tmp_path)
        one = machines.start(1, rendezvous_timeout=3, cwd=tmp_path)
        taken = "--master_port: 29400 cannot be opened on this node (Address already in use); "
        assert mistake(zero).startswith(taken)
        assert mistake(one).startswith("--master_port: what answers at 10.77.0.1:29400 is not node 0 of this run")
    finally:
        server.kill()
        server.wait()


def test_other_data_or_other_code_on_a_node_is_an_error(machines, images, tmp_path):
    fewer = tmp_path / "fewer"
    shutil.copytree(images, fewer)
    next((fewer / "train" / "bee").iterdir()).unlink()
    zero, one = machines.start(0, cwd=tmp_path), machines.start(1, data=fewer, cwd=tmp_path)
    sentence = mistake(zero)
    assert sentence == mistake(one) and sentence.startswith("--data, train/: node 1 has 59 images, fingerprint ")
    assert "node 0 has 60 images, fingerprint " in sentence

    roots = [tmp_path / "old", tmp_path / "new"]
    for root in roots:
        shutil.copytree(ROOT / "common", root / "common", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "tests").mkdir()
        shutil.copy(TINY, root / "tests")
    with open(roots[1] / "common" / "train" / "losses.py", "a") as file:
        file.write("# changed\n")
    zero, one = (machines.start(r, root=roots[r], cwd=tmp_path) for r in (0, 1))
    sentence = mistake(zero)
    assert sentence == mistake(one) and sentence.startswith("code: node 1 has ") and "node 0 has " in sentence


def join(*settings, nnodes=None, node_ranks=None, **more):
    """Results of a rendezvous of as many nodes as there are `settings`, in threads: None, or the message of each."""
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]

    nodes = [
        rendezvous.Rendezvous(nnodes or len(settings), node_rank, "127.0.0.1", port, 30, **more)
        for node_rank in node_ranks or range(len(settings))
    ]

    def one(node, its_settings):
        try:
            node.join(its_settings)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(one, nodes, settings))


def test_the_rendezvous_compares_everything_with_node_0():
    alike = {"--nnodes": 3, "--lr": 0.1}
    assert join(alike, alike, alike) == [None] * 3
    told = join(alike, alike, {"--nnodes": 3, "--lr": 0.2})
    assert told == ["--lr: node 2 has 0.2, node 0 has 0.1; all nodes must have the same"] * 3


def test_a_node_rank_that_is_taken_and_a_node_too_many():
    told = join({}, {}, {}, nnodes=2, node_ranks=[0, 1, 1])
    assert told[0] is None and sorted(map(bool, told[1:])) == [False, True]
    assert "--node_rank: 1 is taken by another node; each needs its own number" in told
    told = join({"--nnodes": 2}, {"--nnodes": 2}, {"--nnodes": 3}, nnodes=2)
    assert told[:2] == [None, None] and told[2].startswith("--nnodes: node 2 has 3, node 0 has 2; ")


def test_nodes_that_join_later_are_compared_when_they_join():
    settings = [{"--lr": lr} for lr in (0.1, 0.1, 0.1, 0.2)]
    told = join(*settings, nnodes=5, node_ranks=[0, 1, 1, 2], is_elastic=True)
    assert told[:3] == [None] * 3 and told[3].startswith("--lr: node 2 has 0.2, node 0 has 0.1; ")


def test_a_rank_that_never_joins_is_named(images, run, tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as the agent holds it
    place = dict(
        RANK="0",
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCH_CPP_LOG_LEVEL="ERROR",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    done = run(
        TINY,
        "--data",
        images,
        "--output-dir",
        tmp_path / "run",
        "--rendezvous-timeout=2",
        check=2,
        env=place,
        fork=False,
    )  # the log level of a launcher is read when torch is imported
    assert user_error(done) == "--rendezvous-timeout: rank 1 of 2 did not start within 2 s; see the output of its node"
