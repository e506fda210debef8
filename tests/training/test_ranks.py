"""Two ranks on a CPU: the loss curve of one process with twice the batch, and what ends a run."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TIMEOUT = 5.0  # of ranks_script.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(map(str, (HERE, HERE.parents[1] / "src", HERE.parent)))
    subprocess.run(
        [sys.executable, str(HERE / "ranks_script.py"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=280,
    )
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    return json.loads((folder / "ended.json").read_text())


def logged(folder):
    with open(folder / "logs" / "metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_ranks_have_the_curve_of_one_process_with_twice_the_batch(folder, ended):
    """To rounding, where noise belongs to the sample and the ranks share one process's batches."""
    assert ended["curve"]["code"] == 0
    one, two = logged(folder / "one"), logged(folder / "two")
    assert len(one) == 6
    assert one[-1]["train/loss"] < one[0]["train/loss"]
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-7)
    weights = [json.loads((folder / name / "weights.json").read_text()) for name in ("one", "two")]
    for name, values in weights[0].items():
        one, other = (torch.tensor(w, dtype=torch.float64) for w in (values, weights[1][name]))
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raise", "hang", "kill"])
def test_a_dead_rank_ends_the_run_in_time_and_nothing_stays_behind(folder, ended, kind):
    assert ended[kind]["code"] == 1
    assert ended[kind]["seconds"] < TIMEOUT + 40
    assert not ended[kind]["left"]
    saved = torch.load(folder / kind / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1  # the second step's is due when the third begins
