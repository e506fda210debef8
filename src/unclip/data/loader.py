"""Turn shards into batches, with or without Lightning; one iteration is one epoch of one rank.

webdataset cannot resume inside an epoch (its issue #234), and its splitting by shards leaves ranks
with unequal numbers of batches (#225). Here ranks and workers split positions instead of shards.
"""

import contextlib
import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from unclip.data.bad_samples import BadSample, BadSamples
from unclip.data.embeddings import check_embeddings, read_embeddings
from unclip.data.order import (
    Partition,
    PositionedSample,
    batches_per_rank,
    epoch_order,
    group_twins,
    partition,
    rng,
    round_robin_state,
    shuffled_batches,
)
from unclip.data.reader import Sample, SampleReader, collate
from unclip.data.shards import Shard, open_shards, read_positions


class SharedEpoch:
    """The epoch and the number of batches to skip, in memory shared with running workers.

    Lightning sets the epoch through the loader's attribute `sampler`.
    """

    def __init__(self):
        self._values = multiprocessing.get_context("spawn").Array("q", 2, lock=False)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._values[0] = epoch

    @property
    def epoch(self) -> int:
        """The epoch that was set last."""
        return self._values[0]

    @property
    def consumed(self) -> int:
        """Number of batches to skip because they were already consumed."""
        return self._values[1]

    @consumed.setter
    def consumed(self, batches: int) -> None:
        self._values[1] = batches


class ShardLoader:
    """Batches of the samples of some shards; one iteration is one epoch of one rank.

    With `shuffle` (training), every batch is full and every epoch has a new order. Each sample
    occurs once per epoch, with two exceptions: the last batch of a rank is filled with samples of
    other ranks (see `partition`), and a bad sample is replaced by another one of its batch. Without
    `shuffle`, every sample occurs exactly once, in the order of the shards and in the same batches
    for any number of workers; bad samples are left out and the last batch is smaller. All ranks
    yield the same number of batches: a rank without samples left yields a padding sample.

    A batch is a dict: `key` and `caption` (lists); `image`, `low_res` and `image_embedding`
    depending on the reader and `embeddings`; and `valid` (bool tensor), False for padding.

    With `crops_per_image` = n, `batch_size` decoded images make n batches, each with one crop of
    every image.

    `state_dict` holds the number of batches consumed in the epoch. A loader that loads it yields
    the rest of the epoch, bit for bit. Skipped samples are read, because the random choices depend
    on them, but not decoded.

    Args:
        source: folder ROOT/SPLIT/SIZE, tar file, or list of tar files.
        reader: makes the samples.
        batch_size: number of samples in a batch of this rank.
        shuffle: whether to shuffle, for training.
        workers: number of reading processes; 0 reads in this process.
        rank: this process's rank.
        world_size: number of ranks that share an epoch.
        shuffle_buffer: number of raw samples in the shuffle buffer.
        embeddings: fingerprint of the CLIP whose stored image embeddings are added.
        max_bad_fraction: tolerated fraction of bad samples per worker and epoch.
        start_method: start method of the workers, "fork", "spawn" or "forkserver"; None for
            Python's default.

    Raises:
        FileNotFoundError: shards or embeddings are missing.
        ValueError: there are no samples, or an argument is out of range; during the iteration: too
            many samples are bad.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        reader: SampleReader,
        *,
        batch_size: int,
        shuffle: bool = False,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 1000,
        embeddings: str | None = None,
        max_bad_fraction: float = 0.01,
        start_method: str | None = None,
    ):
        if batch_size < 1 or workers < 0 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, workers {workers} or rank {rank} of {world_size} is "
                "out of range"
            )
        if embeddings is not None:
            check_embeddings(source, embeddings)
        self.sampler = SharedEpoch()
        self.batch_sampler = None  # Lightning reads it if there is a sampler
        self.batch_size = batch_size
        self._yielded = 0  # batches of the current epoch, including skipped ones
        self._skipped = 0  # batches to skip in the next iteration
        self._dataset = _ShardDataset(
            shards=open_shards(source),
            reader=reader,
            batch_size=batch_size,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            shuffle_buffer=shuffle_buffer,
            embeddings=embeddings,
            max_bad_fraction=max_bad_fraction,
            epoch=self.sampler,
        )
        if not self._dataset.total:
            raise ValueError(f"the shards in {source} hold no samples")
        self._loader = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=start_method if workers else None,
            generator=torch.Generator(),  # otherwise every epoch would advance the global one
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; without `shuffle` all epochs are equal."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches consumed in this epoch."""
        return {"batches": self._yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Skip the consumed batches in the next iteration."""
        self._skipped = state_dict["batches"]

    def __iter__(self) -> Iterator[dict[str, list | Tensor]]:
        # A generator: workers start (and read the epoch) at the first batch, by which time
        # Lightning, which creates the iterator earlier, has set the epoch.
        self._yielded = self.sampler.consumed = self._skipped
        self._skipped = 0
        for batch in self._loader:
            self._yielded += 1
            yield batch


@dataclass(kw_only=True)
class _ShardDataset(IterableDataset):
    """The part of the loader that runs in a worker: its part of an epoch as collated batches.

    Ranks are passed in and not read from environment variables or torch.distributed, because
    spawned workers see neither.
    """

    shards: list[Shard]
    reader: SampleReader
    batch_size: int
    shuffle: bool
    rank: int
    world_size: int
    shuffle_buffer: int
    embeddings: str | None
    max_bad_fraction: float
    epoch: SharedEpoch

    @property
    def total(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def __len__(self) -> int:
        raw_batches = batches_per_rank(self.total, self.batch_size, self.world_size)
        return raw_batches * self.reader.crops_per_image

    def __iter__(self) -> Iterator[dict[str, list | Tensor]]:
        epoch = self.epoch.epoch if self.shuffle else 0
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        if not self.epoch.consumed:
            return self._batches(epoch, number, workers)
        crops = self.reader.crops_per_image
        lengths = [len(self._partition(one, workers).batches) * crops for one in range(workers)]
        consumed, turn = round_robin_state(lengths, self.epoch.consumed)
        number = (number + turn) % workers  # DataLoader starts with worker 0: make it the next one
        return self._batches(epoch, number, workers, skip=consumed[number])

    def _partition(self, worker: int, workers: int) -> Partition:
        return partition(
            self.total,
            self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            worker=worker,
            workers=workers,
            interleaved=not self.shuffle,
        )

    def _batches(self, epoch: int, worker: int, workers: int, *, skip: int = 0) -> Iterator[dict]:
        """Yield a worker's batches, without the first `skip`."""
        part = self._partition(worker, workers)
        skip, crops_done = divmod(skip, self.reader.crops_per_image)
        counter = BadSamples(self.max_bad_fraction, len(part.batches) * self.batch_size)
        if self.shuffle:
            order = epoch_order(self.shards, self.reader.seed, epoch)
            generator = rng("samples", self.reader.seed, epoch, self.rank, worker)
            raw_batches = self._shuffled(order, part, counter, generator)
        else:
            raw_batches = self._in_order(part, counter)
        for raw_batch in itertools.islice(raw_batches, skip, None):
            crops_of_images = self._decode(raw_batch, epoch, part.end, counter)
            first, crops_done = crops_done, 0
            for number in range(first, self.reader.crops_per_image if crops_of_images else 0):
                yield collate([crops[number] for crops in crops_of_images])
        counter.finish()

    def _shuffled(
        self, order: list[Shard], part: Partition, counter: BadSamples, generator: random.Random
    ) -> Iterator[list[PositionedSample]]:
        """Yield full batches of consecutive positions, shuffled."""
        start = part.first + part.batches.start * self.batch_size
        positions = range(start, start + len(part.batches) * self.batch_size)
        groups = group_twins(self._read(order, positions, lambda position: True, counter))
        yield from shuffled_batches(groups, self.batch_size, self.shuffle_buffer, generator)

    def _in_order(self, part: Partition, counter: BadSamples) -> Iterator[list[PositionedSample]]:
        """Yield the rank's own samples in batches; a batch beyond its last sample is empty."""

        def batch_of(position: int) -> int:
            return (position - part.first) // self.batch_size

        samples = self._read(
            self.shards,
            range(part.first, part.end),
            lambda position: batch_of(position) in part.batches,
            counter,
        )
        by_batch = itertools.groupby(samples, key=lambda one: batch_of(one.position))
        number, batch = next(by_batch, (None, []))
        for wanted in part.batches:
            if number != wanted:
                yield []
                continue
            yield list(batch)
            number, batch = next(by_batch, (None, []))

    def _read(
        self,
        order: list[Shard],
        positions: range,
        wanted: Callable[[int], bool],
        counter: BadSamples,
    ) -> Iterator[PositionedSample]:
        """Yield raw samples with their stored embeddings."""
        current, rows, table = None, {}, None
        for position, raw in read_positions(
            order,
            positions,
            wanted=wanted,
            images=self.reader.load_image,
            report=counter.record,
        ):
            embedding = None
            if self.embeddings is not None and raw.bad is None:
                if raw.shard != current:
                    current = raw.shard
                    rows, table = read_embeddings(current, self.embeddings)
                if raw.key in rows:
                    embedding = table[rows[raw.key]].clone()  # a view would keep the whole table
                else:
                    raw = raw._replace(bad=BadSample("missing embedding"))
            yield PositionedSample(position, raw, embedding)

    def _decode(
        self, batch: list[PositionedSample], epoch: int, end: int, counter: BadSamples
    ) -> list[list[Sample]]:
        """Decode a batch to the crops of each image, and pad it if the ranks need it."""
        decoded = []
        for positioned in batch:
            try:
                decoded.append(self._samples(positioned, epoch, valid=positioned.position < end))
            except BadSample as bad:
                counter.record(positioned.sample.shard, positioned.sample.key, bad)
            counter.mark_seen()
        # Ranks must stay in step: full batches in training, at least one sample otherwise.
        minimum = self.batch_size if self.shuffle else min(1, self.world_size - 1)
        if not decoded and minimum:
            decoded.append(self._padding(epoch))
        for number in range(minimum - len(decoded)):
            decoded.append([sample | {"valid": False} for sample in decoded[number]])
        return decoded

    def _samples(self, positioned: PositionedSample, epoch: int, *, valid: bool) -> list[Sample]:
        extra = {"valid": valid}
        if positioned.image_embedding is not None:
            extra["image_embedding"] = positioned.image_embedding
        return [sample | extra for sample in self.reader(positioned.sample, epoch=epoch)]

    def _padding(self, epoch: int) -> list[Sample]:
        """Return the first sample of the source that can be decoded, marked as padding."""
        uncounted = BadSamples(1.0, self.total)
        positions = range(self.total)
        for positioned in self._read(self.shards, positions, lambda position: True, uncounted):
            with contextlib.suppress(BadSample):
                return self._samples(positioned, epoch, valid=False)
        raise ValueError(
            f"none of the {self.total} samples in {self.shards[0].path.parent} can be read"
        )
