"""The order of an epoch: of shards, of samples, and which worker reads which.

Random choices are functions of (seed, epoch, key) alone, so they do not depend on the process that
makes them. A position is a sample's index in an epoch's sequence of shards, 0 … total - 1.
`partition` cuts that sequence over ranks and workers, so that every sample is read exactly once for
any number of ranks and workers.
"""

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from unclip.data.shards import RawSample, Shard


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
    rank: int,
    world_size: int,
    worker: int,
    workers: int,
    interleaved: bool,
) -> Partition:
    """Cut the positions 0 … total - 1 over ranks, and the batches of a rank over its workers.

    Rank r owns [r · total // world_size, (r + 1) · total // world_size). The parts are disjoint,
    cover everything, and differ in size by at most one. Every rank yields
    ceil(ceil(total / world_size) / batch_size) batches, so all ranks yield the same number, and
    the padding of a rank is less than one batch and one sample. Its workers read either
    consecutive batches (each worker then opens few shards) or interleaved ones (worker j % workers
    reads batch j, so the order of batches does not depend on the number of workers).
    """
    first, end = rank * total // world_size, (rank + 1) * total // world_size
    batches = batches_per_rank(total, batch_size, world_size)
    if interleaved:
        return Partition(range(worker, batches, workers), first, end)
    low, high = (-(-number * batches // workers) for number in (worker, worker + 1))
    return Partition(range(low, high), first, end)


def round_robin_state(lengths: Sequence[int], batches: int) -> tuple[list[int], int]:
    """Return the batches consumed from each worker, and the next worker, after `batches` batches.

    The loader takes batches from its workers in turn and skips workers that are exhausted.

    Args:
        lengths: number of batches that each worker yields in an epoch.
        batches: number of batches consumed from all workers together.
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
    """Group each sample KEY with its twins, the samples KEY-… that follow it."""
    group: list[PositionedSample] = []
    for positioned in samples:
        is_twin = (
            group
            and positioned.sample.shard == group[0].sample.shard
            and positioned.sample.key.startswith(group[0].sample.key + "-")
        )
        if group and not is_twin:
            yield group
            group = []
        group.append(positioned)
    if group:
        yield group


def shuffled_batches(
    groups: Iterable[list[PositionedSample]],
    batch_size: int,
    buffer: int,
    generator: random.Random,
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
