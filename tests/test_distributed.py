"""common/distributed.py: collectives on host values, and the comparison of values between ranks."""

import sys

from support import ROOT, run_program

RANK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from common import cli, distributed
from common.device.device import Device
with cli.rank_exit_on_error():
    world = distributed.world_from_environment()
    group, rank = distributed.Group(world, Device("cpu")), world.rank
    group.check_same("3 images", "--data")
    sums = group.all_reduce_max(rank), group.all_reduce_sum([rank, 1])
    assert (*sums, group.from_rank0(lambda: f"rank {{rank}}")) == (1, [1.0, 2.0], "rank 0"), sums
    group.check_same(f"{{3 + rank}} images", "--data")
"""


def test_a_value_that_differs_between_ranks_is_reported_once(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_program(*torchrun, "rank.py", cwd=tmp_path, check=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: --data: rank 1 has 4 images, rank 0 has 3 images; all nodes must have the same files"]
    assert "AssertionError" not in done.stderr
