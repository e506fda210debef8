import importlib
import itertools
from pathlib import Path

import pytest
import tiny_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("data")


def test_every_way_of_reading_counts_the_same_pictures(bench, tmp_path):
    root = tiny_shards.write_shards(tmp_path, splits=("train",), images=40)
    shards = bench.list_shards(root / "train" / "64")
    assert sum(bench.plain_read(shards)) == sum(bench.plain_decode(shards)) == 40
    assert list(itertools.islice(bench.loaded(shards), 2)) == [64, 64]  # an epoch is one batch
    assert next(bench.plain_worker(shards)) == 64
    assert next(bench.replayed(shards)) == 0
    found = bench.rates({"read": lambda: bench.plain_read(itertools.cycle(shards))}, 2, 0.01)
    assert len(found["read"]) == 2 and min(found["read"]) > 0


def test_ratios_are_taken_round_by_round(bench):
    found = {"slow": [10.0, 20.0, 40.0], "fast": [30.0, 40.0, 120.0]}
    table = bench.report(found, {"fast": ("slow", 2.5)})
    assert [list(column.cells) for column in table.columns] == [
        ["slow", "fast"],
        ["20", "40"],
        ["", "3.00"],
        ["", "slow"],
        ["", "2.5"],
    ]
