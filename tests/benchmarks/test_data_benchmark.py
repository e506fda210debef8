import importlib
import itertools
from pathlib import Path

import pytest
import tiny_shards

from unclip.data.shards import list_shards


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("data")


@pytest.fixture
def shards(tmp_path):
    root = tiny_shards.write_shards(tmp_path, splits=("train",), images=40)
    return list_shards(root / "train" / "64")


def test_loop_and_loader_read_without_end(bench, shards):
    assert sum(itertools.islice(bench.loop(shards), 100)) == 100  # of 40 images
    assert list(itertools.islice(bench.loader(shards), 2)) == [64, 64]  # an epoch is one batch


def test_the_loader_is_compared_with_the_loop_round_by_round(bench, shards, monkeypatch):
    rates = {"loop": [10.0, 20.0, 40.0], "loader": [30.0, 40.0, 120.0]}
    monkeypatch.setattr(bench, "interleave", lambda runs, **limits: rates)
    assert bench.compare(shards, rounds=3, seconds=1.0) == [
        {"reader": "loop", "images/s": 20, "ratio": 1, "target": None},
        {"reader": "loader", "images/s": 40, "ratio": 3, "target": bench.TARGET},
    ]
