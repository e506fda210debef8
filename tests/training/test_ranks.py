"""Two ranks on a CPU equal one process with twice the batch, and fail together."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TIMEOUT = 5.0  # as in ranks_script.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(map(str, (HERE, HERE.parents[1] / "src", HERE.parent)))
    done = subprocess.run(
        [sys.executable, str(HERE / "ranks_script.py"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    return json.loads((folder / "ended.json").read_text())


def logged(folder):
    with open(folder / "logs" / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def learned(folder):
    return json.loads((folder / "weights.json").read_text())


def assert_close(folder, other, *, rtol, rows=6):
    """Compares logs and weights of two runs; of the logs only the last `rows` steps."""
    logs, others = logged(folder), logged(other)
    assert len(logs) == 6
    assert logs[-1]["train/loss"] < logs[0]["train/loss"]
    for row, its in zip(logs[-rows:], others, strict=True):
        assert row == pytest.approx(its, rel=rtol)
    weights, others = learned(folder), learned(other)
    for name, values in weights.items():
        ours, theirs = (torch.tensor(w, dtype=torch.float64) for w in (values, others[name]))
        torch.testing.assert_close(theirs, ours, rtol=rtol, atol=rtol / 100)


@pytest.mark.slow
def test_two_ranks_have_the_loss_curve_of_one_process_with_twice_the_batch(folder, ended):
    """Except for rounding, if noise depends on the sample and the ranks share the batches."""
    assert ended["curve"]["code"] == 0
    assert_close(folder / "one", folder / "two", rtol=1e-7)


@pytest.mark.slow
def test_a_run_sharded_over_two_ranks_equals_that_of_one_process(folder, ended):
    """In losses, weights and averages."""
    assert ended["sharded"]["code"] == 0
    assert_close(folder / "whole", folder / "sharded", rtol=1e-4)


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_exactly(folder, ended):
    assert ended["resumed"]["code"] == 0
    assert learned(folder / "resumed") == learned(folder / "sharded")


@pytest.mark.slow
def test_a_run_can_resume_with_another_sharding(folder, ended):
    """Its checkpoint is one file with full tensors in either case."""
    assert ended["shared_out"]["code"] == 0
    for kind in ("shared_out", "joined"):
        assert_close(folder / "whole", folder / kind, rtol=1e-4, rows=2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_muon_on_two_ranks_equals_muon_in_one_process(folder, ended, strategy):
    """Whether each rank has the full weights or shards."""
    assert ended[f"muon_{strategy}"]["code"] == 0
    assert_close(folder / "muon", folder / f"muon_{strategy}", rtol=1e-3)


@pytest.mark.slow
def test_a_sharded_run_of_muon_resumes_bit_exactly(folder, ended):
    assert ended["muon_resumed"]["code"] == 0
    assert learned(folder / "muon_resumed") == learned(folder / "muon_fsdp")


@pytest.mark.slow
def test_all_ranks_resume_from_the_checkpoint_that_rank_0_has_verified(folder, ended):
    """Rank 1 does not read the tensors, so it finds the damaged one."""
    assert ended["damaged"]["code"] == 0
    assert_close(folder / "two", folder / "damaged", rtol=1e-6, rows=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raise_ddp", "hang_ddp", "kill_ddp", "hang_fsdp", "kill_fsdp"])
def test_a_dead_rank_ends_the_run_in_time_and_leaves_no_process(folder, ended, kind):
    assert ended[kind]["code"] == 1
    assert ended[kind]["seconds"] < TIMEOUT + 40
    assert not ended[kind]["left"]
    assert step_of(folder / kind) == 4
    command = f"resume={folder / kind / 'last.ckpt'}"
    before, found, _ = (folder / "output.txt").read_text().partition(command)
    assert found and "died or did not answer" in before.rpartition("rank 0 ends")[2]


@pytest.mark.slow
def test_a_nan_on_one_rank_stops_all_ranks_of_a_sharded_run(folder, ended):
    assert ended["nan_fsdp"]["code"] == 1 and not ended["nan_fsdp"]["left"]
    dumps = sorted(path.name for path in (folder / "nan_fsdp").glob("nonfinite_*"))
    assert dumps == ["nonfinite_5_0.json", "nonfinite_5_1.json"]
    assert step_of(folder / "nan_fsdp") == 4


@pytest.mark.slow
def test_a_preempted_slurm_job_saves_on_all_ranks_and_ends_with_the_signals_code(folder, ended):
    """The signal reached rank 1 only."""
    assert ended["preempt_ddp"]["code"] == 128 + 15 and not ended["preempt_ddp"]["left"]
    assert step_of(folder / "preempt_ddp") == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "undisturbed", "rtol"),
    [("kill_ddp", "two", 1e-6), ("kill_fsdp", "sharded", 0), ("preempt_ddp", "two", 1e-6)],
)
def test_the_next_start_ends_as_if_nothing_had_happened(folder, ended, kind, undisturbed, rtol):
    """Except that Lightning loads float64 weights through float32."""
    assert ended[f"{kind}_again"]["code"] == 0
    expected = learned(folder / undisturbed)
    for name, values in learned(folder / f"{kind}_again").items():
        ours, theirs = torch.tensor(values), torch.tensor(expected[name])
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def step_of(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
