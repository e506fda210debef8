import itertools
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from unclip.data.order import (
    PositionedSample,
    batches_per_rank,
    epoch_order,
    group_twins,
    partition,
    rng,
    round_robin_state,
    shuffled_batches,
)
from unclip.data.shards import RawSample, Shard, read_positions


def positioned(keys, shard="a.tar"):
    return [PositionedSample(i, RawSample(Path(shard), key, {})) for i, key in enumerate(keys)]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_position_has_one_owner_and_ranks_stay_in_step(world_size, workers, interleaved):
    for total, batch_size in itertools.product((1, 2, 7, 16, 33, 100), (1, 4, 16)):
        owned = Counter()
        for rank in range(world_size):
            batches = []
            for worker in range(workers):
                split = {"rank": (rank, world_size), "worker": (worker, workers)}
                part = partition(total, batch_size, **split, interleaved=interleaved)
                batches += part.batches
                for j in part.batches:
                    start = part.first + j * batch_size
                    owned.update(range(start, min(start + batch_size, part.end)))
            assert sorted(batches) == list(range(batches_per_rank(total, batch_size, world_size)))
            padding = len(batches) * batch_size - (part.end - part.first)
            assert 0 <= padding <= batch_size
        assert owned == Counter(range(total))


def test_a_cluster_reads_every_sample_once_and_opens_few_files(monkeypatch):
    """64 ranks with 8 workers each, and 10,000 shards of about 10,000 samples; no file is read."""
    ranks, workers, batch_size = 64, 8, 64
    sizes = random.Random(0)
    shards = [Shard(Path(f"{i:05}.tar"), sizes.randrange(9_000, 11_000)) for i in range(10_000)]
    total = sum(shard.samples for shard in shards)
    opened = []
    monkeypatch.setattr("unclip.data.shards.prefetch", lambda path: None)
    monkeypatch.setattr(
        "unclip.data.shards._read_shard",
        lambda shard, first, part, *_: opened.append((part, shard)) or [],
    )
    started = time.process_time()
    order = epoch_order(shards, 0, 1)
    start_up = time.process_time() - started  # of a worker, in each epoch
    padding = 0
    for rank in range(ranks):
        for worker in range(workers):
            split = {"rank": (rank, ranks), "worker": (worker, workers), "interleaved": False}
            part = partition(total, batch_size, **split)
            first = part.first + part.batches.start * batch_size
            stop = part.first + part.batches.stop * batch_size
            before = len(opened)
            list(read_positions(order, range(first, min(stop, part.end))))
            assert len(opened) - before <= 10_000 // (ranks * workers) + 4  # one after another
            padding += max(stop - part.end, 0)
    opened.sort(key=lambda pair: pair[0].start)
    assert opened[0][0].start == 0 and opened[-1][0].stop == total
    assert all(a.stop == b.start for (a, _), (b, _) in itertools.pairwise(opened))
    assert {shard for _, shard in opened} == set(shards)
    assert len(opened) < len(shards) + ranks * workers  # few shards are opened twice
    assert padding <= ranks * (batch_size + 1)
    assert start_up < 2.0


def test_epoch_order_is_a_reproducible_permutation_that_changes():
    shards = [Shard(Path(f"{i:05}.tar"), 10) for i in range(12)]
    orders = [epoch_order(shards, 3, epoch) for epoch in range(6)]
    assert all(sorted(order) == shards for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert orders[2] == epoch_order(list(reversed(shards)), 3, 2)
    assert orders[2] != epoch_order(shards, 4, 2)


def test_groups_are_a_sample_and_its_twins():
    names = ["1", "1-swap", "2", "3-swap", "IMG-4", "IMG-5", "6", "6-other", "6-0", "6-swap"]
    groups = [" ".join(p.sample.key for p in group) for group in group_twins(positioned(names))]
    expected = ["1 1-swap", "2", "3-swap", "IMG-4", "IMG-5", "6 6-other", "6-0", "6-swap"]
    assert groups == expected


@pytest.mark.parametrize(("batch_size", "buffer"), [(4, 1), (5, 20), (16, 1000), (1, 8)])
def test_shuffled_batches_contain_everything_and_keep_twins_together(batch_size, buffer):
    names = [f"{i}{twin}" for i in range(60) for twin in (["", "-swap"] if i % 3 == 0 else [""])]

    def shuffled():
        groups = group_twins(positioned(names))
        return list(shuffled_batches(groups, batch_size, buffer, random.Random(0)))

    batches = shuffled()
    keys = [[p.sample.key for p in batch] for batch in batches]
    everything = list(itertools.chain(*keys))
    assert Counter(everything) == Counter(names)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    if batch_size > 1 and buffer > 1:
        apart = sum(f"{i}-swap" not in b for b in keys for i in range(0, 60, 3) if str(i) in b)
        assert apart <= 1  # at most where nothing else was left to fill a batch
        assert everything != names
    assert shuffled() == batches


def test_round_robin_skips_exhausted_workers():
    """Compared with a loader that takes turns one batch at a time."""
    lengths = [2, 0, 5]
    turns = [0, 2, 0, 2, 2, 2, 2]
    for batches in range(8):
        consumed, turn = round_robin_state(lengths, batches)
        assert consumed == [turns[:batches].count(worker) for worker in range(3)]
        if batches < 7:
            left = [length - used for length, used in zip(lengths, consumed, strict=True)]
            following = next(w % 3 for w in range(turn, turn + 3) if left[w % 3])
            assert following == turns[batches]


def test_rng_is_a_function_of_its_parts():
    assert rng("crop", 1, 2).random() == rng("crop", 1, 2).random()
    values = {rng(*parts).random() for parts in (("crop", 1, 2), ("crop", 12), ("crop", "1", 2))}
    assert len(values) == 3
    assert rng("samples", 0, 0, 0, 0).randrange(10**9) == 982587444  # the same in every run
