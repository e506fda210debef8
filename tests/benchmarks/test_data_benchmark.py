import importlib
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("data")


@pytest.mark.parametrize("name", ["prior, stored embeddings", "decoder"])
def test_a_reader_s_rate_and_the_cores_that_gpus_need(bench, tmp_path, name):
    bench.generate(tmp_path, 256, 6)
    row = bench.measure(name, tmp_path, seconds=0.01)
    assert row["images/s and core"] > 0 and row["peak MiB"] > 100
    assert row["cores"] * row["images/s and core"] == pytest.approx(row["images/s of 8 GPUs"])
    assert row["images/s of 8 GPUs"] == pytest.approx(2.4e15 / (bench.CASES[name][2] * 1e9))
