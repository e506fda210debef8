"""The processes of an evaluation share its work and meet once."""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from unclip.evaluation import distributed
from unclip.evaluation.distributed import Ranks, launch


def ranks_of(rank):
    return Ranks(SimpleNamespace(world_size=3, global_rank=rank))


def test_blocks_are_the_same_for_any_number_of_ranks():
    alone = Ranks().blocks(23, 4)
    shared = [block for rank in range(3) for block in ranks_of(rank).blocks(23, 4)]
    assert sorted(shared, key=lambda block: block.start) == alone
    assert sum(map(len, alone)) == 23


JOBS = """
import sys
import unclip
from unclip.evaluation.distributed import launch
for job in range(3):  # of a sweep: the processes meet once
    ranks = launch(2, "cpu")
    assert ranks.share(f"folder of {ranks.rank}") == "folder of 0"
    found = ranks.gather((job, ranks.rank))
    ranks.wait()
    assert found == ([(job, 0), (job, 1)] if ranks.first else [])
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node=2"]])
def test_ranks_meet_once_for_all_jobs_of_a_sweep(tmp_path, launcher):
    """Both Fabric itself and torchrun start the second process."""
    script = tmp_path / "jobs.py"
    script.write_text(JOBS)
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("devices", "count"), [(2, 2), ("3", 3), ("auto", 4)])
def test_each_device_gets_a_process(monkeypatch, devices, count):
    import lightning.fabric

    fabric = Mock(return_value=Mock(world_size=3, global_rank=0))
    monkeypatch.setattr(lightning.fabric, "Fabric", fabric)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    distributed.launch.cache_clear()
    try:
        assert launch(1).world == 1 and not fabric.called
        launch(devices)
    finally:
        distributed.launch.cache_clear()
    assert [call.kwargs["devices"] for call in fabric.call_args_list] == [count]
