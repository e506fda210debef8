"""The order of shards and samples in an epoch, and the worker that reads each sample.

Random choices are functions of (seed, epoch, key) alone, so they do not depend on the process that
makes them. A position is a sample's index in an epoch's sequence of shards, 0 … total - 1.
`partition` splits that sequence among ranks and workers, so that every sample is read exactly once
for any number of ranks and workers.
"""

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from unclip.data.shards import RawSample, Shard

TWINS = ("-colours", "-other", "-swap")  # ends of the keys of emoji scenes' twins


def rng(*parts: str | int) -> random.Random:
    """Return a generator that is a function of `parts`, the same in every process and run."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def epoch_order(shards: Sequence[Shard], seed: int, epoch: int) -> list[Shard]:
    """Return the shards in the order of an epoch, the same on all ranks."""
    order = sorted(shards)
    rng("shards", seed, epoch).shuffle(order)
    return order


class Partition(NamedTuple):
    """The part of an epoch that one worker of one rank reads.

    Batch j of the rank holds the positions first + j · batch_size … first + (j + 1) · batch_size
    - 1 (modulo the total). Those below `end` belong to the rank; the others are padding.
    """

    batches: range
    first: int
    end: int


def batches_per_rank(total: int, batch_size: int, world_size: int) -> int:
    """Return the number of batches that every rank yields in an epoch."""
    return math.ceil(math.ceil(total / world_size) / batch_size)


def partition(
    total: int,
    batch_size: int,
    *,
    rank: tuple[int, int],
    worker: tuple[int, int],
    interleaved: bool,
) -> Partition:
    """Split the positions 0 … total - 1 among ranks, and a rank's batches among its workers.

    Rank r of n owns [r · total // n, (r + 1) · total // n): the parts are disjoint, cover
    everything, and differ in size by at most one. All ranks yield the same number of batches, so
    the padding of a rank is less than one batch and one sample.

    Args:
        total: number of samples in an epoch.
        batch_size: number of samples in a batch.
        rank: rank and number of ranks.
        worker: worker of the rank and number of its workers.
        interleaved: whether worker j % workers reads batch j, so that the order of the batches does
            not depend on the number of workers. Otherwise each worker reads consecutive batches,
            for which it opens few shards.
    """
    (number, ranks), (index, workers) = rank, worker
    first, end = number * total // ranks, (number + 1) * total // ranks
    batches = batches_per_rank(total, batch_size, ranks)
    if interleaved:
        return Partition(range(index, batches, workers), first, end)
    low, high = (-(-one * batches // workers) for one in (index, index + 1))
    return Partition(range(low, high), first, end)


def round_robin_state(lengths: Sequence[int], batches: int) -> tuple[list[int], int]:
    """Return the batches consumed from each worker, and the next worker, after `batches` batches.

    The loader takes batches from its workers in turn and skips workers that are exhausted;
    `lengths` has the number of batches that each worker yields in an epoch.
    """
    consumed = [0] * len(lengths)
    turn = 0
    for _ in range(min(batches, sum(lengths))):
        while consumed[turn] == lengths[turn]:
            turn = (turn + 1) % len(lengths)
        consumed[turn] += 1
        turn = (turn + 1) % len(lengths)
    return consumed, turn


class PositionedSample(NamedTuple):
    """A raw sample with its position in the epoch, and its stored embedding if requested."""

    position: int
    sample: RawSample
    image_embedding: Tensor | None = None


def group_twins(samples: Iterable[PositionedSample]) -> Iterator[list[PositionedSample]]:
    """Group each sample KEY with its twins, the samples KEY-swap, … that follow it."""
    group: list[PositionedSample] = []
    for positioned in samples:
        is_twin = (
            group
            and positioned.sample.shard == group[0].sample.shard
            and positioned.sample.key.removeprefix(group[0].sample.key) in TWINS
        )
        if group and not is_twin:
            yield group
            group = []
        group.append(positioned)
    if group:
        yield group


def shuffled_batches(
    groups: Iterable[list[PositionedSample]], batch_size: int, buffer: int, generator: random.Random
) -> Iterator[list[PositionedSample]]:
    """Fill batches from a shuffle buffer of about `buffer` samples, keeping groups in one batch.

    A group that does not fit into the rest of a batch waits for the next one. A group is split
    only if no group in the buffer fits. The last batch may be smaller.
    """
    groups = iter(groups)
    waiting: list[list[PositionedSample]] = []
    held = 0
    batch: list[PositionedSample] = []
    while True:
        while held < max(buffer, 1) and (group := next(groups, None)) is not None:
            waiting.append(group)
            held += len(group)
        if not waiting:
            break
        room = batch_size - len(batch)
        index = generator.randrange(len(waiting))
        if len(waiting[index]) > room:
            candidates = [i for i, group in enumerate(waiting) if len(group) <= room]
            index = generator.choice(candidates) if candidates else index
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
