"""Several processes find what one does."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys

import pytest
import torch
from tiny_protocol import context_of, measure, values

from unclip.evaluation import distributed
from unclip.evaluation.distributed import Ranks, launch


class FakeFabric:
    """A Fabric of some rank among three."""

    world_size = 3

    def __init__(self, rank):
        self.global_rank = rank


def test_blocks_are_the_same_for_any_number_of_ranks():
    alone = Ranks().blocks(23, 4)
    shared = [block for rank in range(3) for block in Ranks(FakeFabric(rank)).blocks(23, 4)]
    assert sorted(shared, key=lambda block: block.start) == alone
    assert sum(map(len, alone)) == 23


def _rank(rank, port, model, data, out):
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = launch(2, "cpu")
    assert (ranks.rank, ranks.world) == (rank, 2) and launch(2, "cpu") is ranks
    context = context_of(model, data, out, ranks=ranks)
    found = measure(context)
    assert (found is None) == (rank == 1)
    if found is not None:
        (out / "values.json").write_text(json.dumps(values(found)))


@pytest.mark.slow
def test_two_ranks_find_what_one_does(tiny_model, squares, tmp_path):
    alone = context_of(tiny_model, squares, tmp_path / "one")
    expected = values(measure(alone))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "two").mkdir()
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=_rank, args=(rank, port, tiny_model, squares, tmp_path / "two"))
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    assert json.loads((tmp_path / "two" / "values.json").read_text()) == expected
    for row in alone.folder.rows:
        twin = next((tmp_path / "two").rglob(row.path.name))
        assert twin.read_bytes() == row.path.read_bytes()


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

    started = []

    class Recorder(FakeFabric):
        def __init__(self, **settings):
            super().__init__(0)
            started.append(settings)

        def launch(self):
            pass

    monkeypatch.setattr(lightning.fabric, "Fabric", Recorder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    distributed.launch.cache_clear()
    try:
        assert launch(1).world == 1 and not started
        launch(devices)
    finally:
        distributed.launch.cache_clear()
    assert [settings["devices"] for settings in started] == [count]
