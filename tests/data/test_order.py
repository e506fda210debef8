import random
from collections import Counter
from pathlib import Path

import pytest

from unclip.data.order import (
    Placed,
    batches_per_rank,
    epoch_order,
    grouped,
    share,
    shuffled_batches,
)
from unclip.data.shards import RawSample, Shard


def placed(keys, shard="a.tar"):
    return [Placed(i, RawSample(Path(shard), key, {})) for i, key in enumerate(keys)]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_shares_own_every_position_once_and_ranks_keep_step(world_size, workers, interleaved):
    for total in (1, 2, 7, 16, 33, 100):
        for batch_size in (1, 4, 16):
            owned = Counter()
            for rank in range(world_size):
                batches = []
                for worker in range(workers):
                    piece = share(
                        total,
                        batch_size,
                        rank=rank,
                        world_size=world_size,
                        worker=worker,
                        workers=workers,
                        interleaved=interleaved,
                    )
                    batches += piece.batches
                    for j in piece.batches:
                        start = piece.first + j * batch_size
                        positions = range(start, start + batch_size)
                        owned.update(p for p in positions if p < piece.end)
                assert sorted(batches) == list(
                    range(batches_per_rank(total, batch_size, world_size))
                )
                own = piece.end - piece.first
                assert 0 <= len(batches) * batch_size - own <= batch_size  # padding
            assert owned == Counter(range(total))


def test_epoch_order_is_a_reproducible_permutation_that_changes():
    shards = [Shard(Path(f"{i:05}.tar"), 10) for i in range(12)]
    orders = [epoch_order(shards, 3, epoch) for epoch in range(6)]
    assert all(sorted(order) == shards for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert orders[2] == epoch_order(list(reversed(shards)), 3, 2)
    assert orders[2] != epoch_order(shards, 4, 2)


def test_groups_are_a_sample_and_its_twins():
    names = ["1", "1-swap", "2", "3-swap", "IMG-4", "IMG-5", "6", "6-a", "6-b"]
    groups = [[p.sample.key for p in group] for group in grouped(placed(names))]
    assert groups == [["1", "1-swap"], ["2"], ["3-swap"], ["IMG-4"], ["IMG-5"], ["6", "6-a", "6-b"]]


@pytest.mark.parametrize(("batch_size", "buffer"), [(4, 1), (5, 20), (16, 1000), (1, 8)])
def test_shuffled_batches_lose_nothing_and_keep_twins_together(batch_size, buffer):
    names = [f"{i}{twin}" for i in range(60) for twin in (["", "-swap"] if i % 3 == 0 else [""])]
    batches = list(shuffled_batches(grouped(placed(names)), batch_size, buffer, random.Random(0)))
    drawn = [[p.sample.key for p in batch] for batch in batches]
    everything = [key for batch in drawn for key in batch]
    assert Counter(everything) == Counter(names)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    if batch_size > 1 and buffer > 1:
        apart = sum(f"{i}-swap" not in b for b in drawn for i in range(0, 60, 3) if str(i) in b)
        assert apart <= 1  # at most where nothing else was left to fill a batch
        assert everything != names
    again = shuffled_batches(grouped(placed(names)), batch_size, buffer, random.Random(0))
    assert list(again) == batches
