"""Two ranks on a CPU equal one process with twice the batch, and fail together.

FSDP gathers each block once in each pass, and in bfloat16 where the blocks compute in it.
"""

import json

import numpy as np
import pytest
import script
import torch
from tiny_shards import COLORS, write_shards

pytestmark = pytest.mark.slow
TIMEOUT = 5.0  # as in ranks_script.py
VALIDATED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    root = write_shards(folder / "data", splits=("train",), images=32)
    write_shards(root, splits=("val",), images=VALIDATED)
    (folder / "shards").mkdir()
    output = script.run_helper("training/ranks_script.py", folder, root)
    (folder / "output.txt").write_text(output)
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    return json.loads((folder / "ended.json").read_text())


def logged(folder):
    return [{name: float(v) for name, v in row.items()} for row in script.logged(folder)]


def step_of(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["global_step"]


def assert_same_weights(folder, other, *, rtol, atol):
    ours, theirs = (torch.load(f / "weights.pt", weights_only=True) for f in (folder, other))
    torch.testing.assert_close(theirs, ours, rtol=rtol, atol=atol)


def assert_close(folder, other, *, rtol, rows=6):
    """Compares logs and weights of two runs; of the logs only the last `rows` steps."""
    logs, others = logged(folder), logged(other)
    assert len(logs) == 6
    assert logs[-1]["train/loss"] < logs[0]["train/loss"]
    for row, its in zip(logs[-rows:], others, strict=True):
        assert row == pytest.approx(its, rel=rtol)
    assert_same_weights(folder, other, rtol=rtol, atol=rtol / 100)


def test_ranks_differ_in_data_and_noise_agree_on_weights_and_stop_together(folder):
    """Two processes train three steps; in the third, rank 1 has a NaN loss."""
    place = folder / "shards"
    first, second = (json.loads((place / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert len(set(first["keys"] + second["keys"])) == 3 * 2 * 4  # no image on both, none twice
    assert len(set(first["noises"] + second["noises"])) == 3 * 2
    assert any(first["mean"])  # fitted on rank 0, broadcast to rank 1
    colors = [list(COLORS.values())[index % len(COLORS)] for index in range(VALIDATED)]
    brightness = np.mean(colors) / 127.5 - 1  # of all seven; the ranks have four and three
    assert first["brightness"] == pytest.approx(brightness, abs=1e-5)
    for same in ("weight", "average", "mean", "brightness"):
        assert first[same] == second[same]
    assert all("NonFiniteError: step 2" in rank["failed"] for rank in (first, second))
    dumps = ["nonfinite_2_0.json", "nonfinite_2_1.json"]
    files = sorted(path.name for path in place.iterdir())
    assert files == ["last.ckpt", *dumps, "rank_0.json", "rank_1.json"]


@pytest.mark.parametrize(
    ("kind", "alone", "ranks", "rtol"),
    [
        ("curve", "one", "two", 1e-7),
        ("sharded", "whole", "sharded", 1e-4),
        ("muon_ddp", "muon", "muon_ddp", 1e-3),
        ("muon_fsdp", "muon", "muon_fsdp", 1e-3),
    ],
)
def test_two_ranks_have_the_loss_curve_of_one_process(folder, ended, kind, alone, ranks, rtol):
    """Except for rounding, if noise depends on the sample and the ranks share the batches."""
    assert ended[kind]["code"] == 0
    assert_close(folder / alone, folder / ranks, rtol=rtol)


@pytest.mark.parametrize(("kind", "whole"), [("resumed", "sharded"), ("muon_resumed", "muon_fsdp")])
def test_a_sharded_run_resumes_bit_exactly(folder, ended, kind, whole):
    assert ended[kind]["code"] == 0
    assert_same_weights(folder / kind, folder / whole, rtol=0, atol=0)


def test_a_run_can_resume_with_another_sharding(folder, ended):
    """Its checkpoint is one file with full tensors in either case."""
    assert ended["shared_out"]["code"] == 0
    for kind in ("shared_out", "joined"):
        assert_close(folder / "whole", folder / kind, rtol=1e-4, rows=2)


def test_all_ranks_resume_from_the_checkpoint_that_rank_0_has_verified(folder, ended):
    """Rank 1 does not read the tensors, so it finds the damaged one."""
    assert ended["damaged"]["code"] == 0
    assert_close(folder / "two", folder / "damaged", rtol=1e-6, rows=2)


@pytest.mark.parametrize("kind", ["raise_ddp", "hang_ddp", "kill_ddp", "hang_fsdp", "kill_fsdp"])
def test_a_dead_rank_ends_the_run_in_time_and_leaves_no_process(folder, ended, kind):
    assert ended[kind]["code"] == 1
    assert ended[kind]["seconds"] < TIMEOUT + 40
    assert not ended[kind]["left"]
    assert step_of(folder / kind) == 4
    command = f"resume={folder / kind / 'last.ckpt'}"
    before, found, _ = (folder / "output.txt").read_text().partition(command)
    assert found and "died or did not answer" in before.rpartition("rank 0 ends")[2]


def test_a_nan_on_one_rank_stops_all_ranks_of_a_sharded_run(folder, ended):
    assert ended["nan_fsdp"]["code"] == 1 and not ended["nan_fsdp"]["left"]
    dumps = sorted(path.name for path in (folder / "nan_fsdp").glob("nonfinite_*"))
    assert dumps == ["nonfinite_5_0.json", "nonfinite_5_1.json"]
    assert step_of(folder / "nan_fsdp") == 4


def test_a_preempted_slurm_job_saves_on_all_ranks_and_ends_with_the_signals_code(folder, ended):
    """The signal reached rank 1 only."""
    assert ended["preempt_ddp"]["code"] == 128 + 15 and not ended["preempt_ddp"]["left"]
    assert step_of(folder / "preempt_ddp") == 4


@pytest.mark.parametrize(
    ("kind", "undisturbed", "rtol"),
    [("kill_ddp", "two", 1e-6), ("kill_fsdp", "sharded", 0), ("preempt_ddp", "two", 1e-6)],
)
def test_the_next_start_ends_as_if_nothing_had_happened(folder, ended, kind, undisturbed, rtol):
    """Except that Lightning loads float64 weights through float32."""
    assert ended[f"{kind}_again"]["code"] == 0
    assert_same_weights(folder / f"{kind}_again", folder / undisturbed, rtol=rtol, atol=rtol)


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathers")
    script.run_helper("training/gathers_script.py", folder)
    return json.loads((folder / "counts.json").read_text())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler_256"])
def test_a_pass_gathers_each_weight_about_once(gathered, name, bf16):
    """Attention blocks of a decoder are gathered twice, first for the context's keys and values."""
    found = gathered[f"{name} {'bf16' if bf16 else 'float32'}"]
    assert 1 <= found["forward"] < (1.1 if name == "decoder" else 1.01)
    assert 0 < found["backward"] <= 1  # what is outside of the blocks was not released
    assert found["reduce"] == pytest.approx(1, abs=0.01)
    assert found["loss"] == pytest.approx(found["expected"], rel=0.02 if bf16 else 1e-5)
    assert found["error"] < (0.05 if bf16 else 1e-5)  # of an accumulated gradient
    assert found["reduce dtypes"] == ["torch.float32"]
    assert "torch.bfloat16" not in found["saved"]
    if bf16:
        assert "torch.bfloat16" in found["forward dtypes"]
    else:
        assert found["forward dtypes"] == ["torch.float32"]
