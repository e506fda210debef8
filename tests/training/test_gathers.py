"""FSDP gathers each block once in each pass, and in bfloat16 where the blocks compute in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = ("prior", "decoder", "upsampler_256")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathers")
    path = os.pathsep.join(map(str, (HERE, HERE.parents[1] / "src", HERE.parent)))
    subprocess.run(
        [sys.executable, str(HERE / "gathers_script.py"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=280,
    )
    return json.loads((folder / "counts.json").read_text())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pass_gathers_each_weight_about_once(counts, name, precision):
    """Attention blocks of a decoder are gathered twice, first for the context's keys and values."""
    found = counts[f"{name} {precision}"]
    assert 1 <= found["forward"] < (1.1 if name == "decoder" else 1.01)
    assert 0 < found["backward"] <= 1  # what is outside of the blocks was not released
    assert found["reduce"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_gathered_in_bf16_and_gradients_are_summed_in_float32(counts, name):
    found = counts[f"{name} bf16"]
    assert "torch.bfloat16" in found["forward dtypes"]
    assert found["reduce dtypes"] == ["torch.float32"]
    assert "torch.bfloat16" not in found["saved"]
    assert counts[f"{name} float32"]["forward dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_one_process(counts, name, precision):
    found = counts[f"{name} {precision}"]
    tolerance = 0.02 if precision == "bf16" else 1e-5
    assert found["loss"] == pytest.approx(found["expected"], rel=tolerance)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_accumulated_batch_adds_to_the_shards_of_the_gradient(counts, name, precision):
    assert counts[f"{name} {precision}"]["error"] < (0.05 if precision == "bf16" else 1e-5)
