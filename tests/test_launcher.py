"""A process takes the rank that its launcher gave it, and no stale one."""

import os

import pytest

from unclip import launcher
from unclip.launcher import LaunchError, is_first_rank, settle_rank, started_by

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
TORCHRUN |= {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
LIGHTNING = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}


@pytest.fixture
def started(monkeypatch):
    """Return a function that sets the variables of a launcher and returns the ranks that remain."""
    names = (*launcher._RANKS, *launcher._GROUP, "TORCHELASTIC_RUN_ID", "SLURM_NTASKS_PER_NODE")
    for name in (*names, "SLURM_JOB_NAME"):
        monkeypatch.setenv(name, "")  # restores it also if the test removes it
        monkeypatch.delenv(name)

    def start(variables, devices=1, nodes=1):
        os.environ |= variables
        settle_rank(devices, nodes)
        return {name for name in launcher._RANKS if name in os.environ}

    return start


@pytest.mark.parametrize("name", launcher._RANKS)
def test_a_stale_rank_is_removed_from_a_run_on_one_device(started, capsys, name):
    assert started({name: "1", "WORLD_SIZE": "2"}) == set()
    assert is_first_rank()
    assert capsys.readouterr().err == f"ignored, because no launcher set it: {name}\n"


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "ranks"),
    [
        (TORCHRUN | {"SLURM_PROCID": "7"}, 2, 2, {"RANK", "LOCAL_RANK", "GROUP_RANK"}),
        (TORCHRUN, "auto", 1, {"RANK", "LOCAL_RANK", "GROUP_RANK"}),
        (SRUN | {"RANK": "7"}, 2, 1, {"SLURM_PROCID"}),
        (LIGHTNING | {"RANK": "7"}, 2, 1, {"LOCAL_RANK", "NODE_RANK"}),
    ],
)
def test_the_launchers_own_rank_counts(started, variables, devices, nodes, ranks):
    assert started(variables, devices, nodes) == ranks
    assert not is_first_rank()


@pytest.mark.parametrize(
    ("variables", "devices", "said"),
    [
        (TORCHRUN, 1, r"4 processes.*ask for 1: add trainer=ddp trainer\.devices=2"),
        (SRUN, 1, "2 tasks.*add trainer=slurm.*--ntasks-per-node.*--ntasks=1"),
        ({"SLURM_NTASKS": "2"}, 2, "--ntasks-per-node"),
    ],
)
def test_several_processes_for_one_device_are_refused_with_the_fix(
    started, variables, devices, said
):
    with pytest.raises(LaunchError, match=said):
        started(variables, devices)


@pytest.mark.parametrize("more", [{"SLURM_NTASKS": "1"}, {"SLURM_JOB_NAME": "bash"}])
def test_one_process_of_a_slurm_job_starts_its_ranks_itself(started, more):
    assert started(SRUN | more, 4) == set()
    assert started_by() is None and is_first_rank()
