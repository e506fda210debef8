import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import COLORS, write_shards

HERE = Path(__file__).parent
VALIDATED = 7


@pytest.mark.slow
def test_ranks_differ_in_data_and_noise_agree_on_weights_and_stop_together(tmp_path):
    """Two processes train three steps; in the third, rank 1 has a NaN loss."""
    root, folder = write_shards(tmp_path / "data", splits=("train",), images=32), tmp_path / "run"
    write_shards(root, splits=("val",), images=VALIDATED)
    folder.mkdir()
    path = os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")])
    subprocess.run(
        [sys.executable, str(HERE / "ddp_script.py"), str(folder), str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=280,
    )
    first, second = (json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert len(set(first["keys"] + second["keys"])) == 3 * 2 * 4  # no image on both, none twice
    assert len(set(first["noises"] + second["noises"])) == 3 * 2
    assert any(first["mean"])  # fitted on rank 0, broadcast to rank 1
    colors = [list(COLORS.values())[index % len(COLORS)] for index in range(VALIDATED)]
    brightness = np.mean(colors) / 127.5 - 1  # of all seven; the ranks have four and three
    assert first["brightness"] == pytest.approx(brightness, abs=1e-5)
    for same in ("weight", "average", "mean", "brightness"):
        assert first[same] == second[same]
    assert "NonFiniteError: step 2" in first["failed"]
    assert "NonFiniteError: step 2" in second["failed"]
    files = {path.name for path in folder.glob("*") if path.suffix != ".log"}
    dumps = {"nonfinite_2_0.json", "nonfinite_2_1.json"}
    assert files == {
        "last.ckpt",
        "rank_0.json",
        "rank_1.json",
        *dumps,
    }
