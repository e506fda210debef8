"""The order of an epoch: of shards, of samples, and who reads which.

A position is a sample's place in an epoch: the epoch's shards, one after another, as a line of
0 … total - 1. `share` cuts that line over ranks and workers, so that nothing is read twice and
nothing is left out whatever their numbers.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from unclip.data.choosing import seeded
from unclip.data.shards import RawSample, Shard


def epoch_order(shards: Sequence[Shard], seed: int, epoch: int) -> list[Shard]:
    """The shards in the order of an epoch: a function of (seed, epoch), equal on all ranks."""
    order = sorted(shards)
    seeded("shards", seed, epoch).shuffle(order)
    return order


class Share(NamedTuple):
    """What one worker of one rank reads.

    Batch j of the rank holds the positions first + j · batch_size … first + (j + 1) · batch_size
    - 1 (modulo the total); those below `end` are the rank's own, the others are padding.
    """

    batches: range
    first: int
    end: int


def batches_per_rank(total: int, batch_size: int, world_size: int) -> int:
    """Batches that every rank yields in an epoch."""
    return math.ceil(math.ceil(total / world_size) / batch_size)


def share(
    total: int,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    worker: int,
    workers: int,
    interleaved: bool,
) -> Share:
    """Cut the positions 0 … total - 1 over ranks, and a rank's batches over its workers.

    Rank r owns [r · total // world_size, (r + 1) · total // world_size): the pieces are disjoint,
    cover everything, and their sizes differ by at most one. Every rank yields
    ceil(ceil(total / world_size) / batch_size) batches, so all yield equally many, and a rank's
    padding is less than one batch and one sample. Its workers split its batches: either into
    consecutive runs (each worker then reads few shards) or interleaved (batch j is worker
    j % workers', so the loader's order does not depend on the number of workers).
    """
    first, end = rank * total // world_size, (rank + 1) * total // world_size
    batches = batches_per_rank(total, batch_size, world_size)
    if interleaved:
        return Share(range(worker, batches, workers), first, end)
    low, high = (-(-number * batches // workers) for number in (worker, worker + 1))
    return Share(range(low, high), first, end)


def turns(yields: Sequence[int], batches: int) -> tuple[list[int], int]:
    """(how many of the first `batches` come from each worker, the worker whose turn it is then).

    Workers take turns, and one that has yielded all of its batches is passed over.

    Args:
        yields: batches of each worker in an epoch.
        batches: of all workers together.
    """
    had = [0] * len(yields)
    turn = 0
    for _ in range(min(batches, sum(yields))):
        while had[turn] == yields[turn]:
            turn = (turn + 1) % len(yields)
        had[turn] += 1
        turn = (turn + 1) % len(yields)
    return had, turn


class Placed(NamedTuple):
    """A raw sample with its position in the epoch, and its stored embedding where asked for."""

    position: int
    sample: RawSample
    image_embedding: Tensor | None = None


def grouped(samples: Iterable[Placed]) -> Iterator[list[Placed]]:
    """Put a sample and its twins together: KEY and the samples KEY-… right after it."""
    group: list[Placed] = []
    for placed in samples:
        twin = (
            group
            and placed.sample.shard == group[0].sample.shard
            and placed.sample.key.startswith(group[0].sample.key + "-")
        )
        if group and not twin:
            yield group
            group = []
        group.append(placed)
    if group:
        yield group


def shuffled_batches(
    groups: Iterable[list[Placed]], batch_size: int, buffer: int, randomness: random.Random
) -> Iterator[list[Placed]]:
    """Draw batches from a buffer of about `buffer` samples, keeping groups in one batch.

    A group that does not fit into what is left of a batch waits; only where nothing in the buffer
    fits is one split. The last batch may be smaller.
    """
    groups = iter(groups)
    waiting: list[list[Placed]] = []
    held = 0
    batch: list[Placed] = []
    while True:
        while held < max(buffer, 1) and (group := next(groups, None)) is not None:
            waiting.append(group)
            held += len(group)
        if not waiting:
            break
        room = batch_size - len(batch)
        index = randomness.randrange(len(waiting))
        if len(waiting[index]) > room:
            candidates = [i for i, group in enumerate(waiting) if len(group) <= room]
            index = randomness.choice(candidates) if candidates else index
        waiting[index], waiting[-1] = waiting[-1], waiting[index]
        group = waiting.pop()
        if len(group) > room:
            waiting.append(group[room:])
            group = group[:room]
        batch += group
        held -= len(group)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
