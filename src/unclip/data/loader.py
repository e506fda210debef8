"""Turn shards into batches, with or without Lightning: one pass is one epoch of one rank."""

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
from unclip.data.choosing import seeded
from unclip.data.embeddings import check_embeddings, read_embeddings
from unclip.data.order import (
    Placed,
    Share,
    batches_per_rank,
    epoch_order,
    grouped,
    share,
    shuffled_batches,
    turns,
)
from unclip.data.reader import Sample, SampleReader, collate
from unclip.data.shards import Shard, open_shards, read_positions


class SharedEpoch:
    """The epoch and how much of it is done already, seen by workers that are already running.

    Lightning sets the epoch through the loader's attribute `sampler`.
    """

    def __init__(self):
        self._values = multiprocessing.get_context("spawn").Array("q", 2, lock=False)

    def set_epoch(self, epoch: int) -> None:
        """Takes effect when the loader is next iterated."""
        self._values[0] = epoch

    @property
    def epoch(self) -> int:
        """The epoch that was last set."""
        return self._values[0]

    @property
    def done(self) -> int:
        """Batches of the epoch that are left out, since they were had before."""
        return self._values[1]

    @done.setter
    def done(self, batches: int) -> None:
        self._values[1] = batches


class ShardLoader:
    """Batches of the samples of some shards; iterating it is one epoch of one rank.

    With `shuffle` (training) every batch is full and every epoch has a new order. Each sample
    comes once an epoch, except that a rank's last batch is filled up with samples that another
    reads too (see `share`), and that a bad sample is replaced by another of its batch. Without
    `shuffle` every sample comes exactly once, in the shards' order and in the same batches for
    any number of workers; bad samples are left out and the last batch is smaller. All ranks yield
    equally many batches: a rank that has nothing left yields a stand-in of one sample, marked by
    `valid` being False (only possible with several ranks).

    The batch is a dict: `key` and `caption` (lists), `image`, `low_res`, `image_embedding` and
    `metadata` as the reader and `embeddings` say, and `valid` (bool tensor): False for fillers.

    With `crops_per_image` = n, batch_size pictures are decoded for n batches of which each has
    one crop of each picture.

    `state_dict` says how far an epoch has got, and a loader that it is loaded into yields the rest
    of the epoch, the very batches that the first would have yielded. What is left out is read, to
    draw what was drawn, but not decoded.

    Args:
        source: a folder ROOT/SPLIT/SIZE, a tar file, or a list of tar files.
        reader: makes the samples.
        batch_size: samples in a batch (of this rank).
        shuffle: training; see above.
        workers: processes that read; 0 reads in this one.
        rank: which of the `world_size` shares is this one's.
        world_size: number of ranks that share an epoch.
        shuffle_buffer: raw samples from which batches are drawn.
        embeddings: fingerprint of the CLIP whose stored image embeddings are added.
        max_bad_fraction: the part of the samples that may be bad, per worker and epoch.
        start_method: of the workers: "fork", "spawn", "forkserver"; None for Python's default.

    Raises:
        FileNotFoundError: shards or embeddings are missing.
        ValueError: no samples, or an argument out of range; while iterating: too many bad samples.
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
                f"batch_size {batch_size}, workers {workers}, rank {rank} of {world_size}: "
                "one of them is out of range"
            )
        if embeddings is not None:
            check_embeddings(source, embeddings)
        self.sampler = SharedEpoch()
        self.batch_sampler = None  # Lightning looks at it where there is a sampler
        self.batch_size = batch_size
        self._yielded = 0  # batches of the present epoch, those left out included
        self._left_out = 0  # of the epoch that is iterated next
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
            generator=torch.Generator(),  # else each epoch would draw from the global generator
        )

    @property
    def samples(self) -> int:
        """Samples of the whole source, of all ranks."""
        return self._dataset.total

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; without `shuffle` there is but one."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch have been had."""
        return {"batches": self._yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Leaves out, in the next iteration, the batches that have been had."""
        self._left_out = state_dict["batches"]

    def __iter__(self) -> Iterator[dict[str, list | Tensor]]:
        # A generator: workers start (and read the epoch) at the first batch, by which time
        # Lightning, which creates the iterator earlier, has set the epoch.
        self._yielded = self.sampler.done = self._left_out
        self._left_out = 0
        for batch in self._loader:
            self._yielded += 1
            yield batch


@dataclass(kw_only=True)
class _ShardDataset(IterableDataset):
    """What runs in a worker: its share of an epoch, as collated batches.

    Everything that it needs to know, ranks included, is given; nothing is read from environment
    variables or torch.distributed, so it works in spawned workers.
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
        return self._raw_batches * self.reader.crops_per_image

    @property
    def _raw_batches(self) -> int:
        return batches_per_rank(self.total, self.batch_size, self.world_size)

    def __iter__(self) -> Iterator[dict[str, list | Tensor]]:
        epoch = self.epoch.epoch if self.shuffle else 0
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        if not self.epoch.done:
            return self._batches(epoch, number, workers)
        crops = self.reader.crops_per_image
        yields = [len(self._share(one, workers).batches) * crops for one in range(workers)]
        had, turn = turns(yields, self.epoch.done)
        number = (number + turn) % workers  # the worker whose turn it is comes first
        return self._batches(epoch, number, workers, done=had[number])

    def _share(self, worker: int, workers: int) -> Share:
        return share(
            self.total,
            self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            worker=worker,
            workers=workers,
            interleaved=not self.shuffle,
        )

    def _batches(self, epoch: int, worker: int, workers: int, *, done: int = 0) -> Iterator[dict]:
        """A worker's batches, without the first `done`."""
        piece = self._share(worker, workers)
        done, crops_done = divmod(done, self.reader.crops_per_image)
        counter = BadSamples(self.max_bad_fraction, len(piece.batches) * self.batch_size)
        if self.shuffle:
            order = epoch_order(self.shards, self.reader.seed, epoch)
            randomness = seeded("samples", self.reader.seed, epoch, self.rank, worker)
            raw_batches = self._shuffled(order, piece, counter, randomness)
        else:
            raw_batches = self._in_order(piece, counter)
        for raw_batch in itertools.islice(raw_batches, done, None):
            pictures = self._decode(raw_batch, epoch, piece.end, counter)
            first, crops_done = crops_done, 0
            for number in range(first, self.reader.crops_per_image if pictures else 0):
                yield collate([crops[number] for crops in pictures])
        counter.finish()

    def _shuffled(
        self, order: list[Shard], piece: Share, counter: BadSamples, randomness: random.Random
    ) -> Iterator[list[Placed]]:
        """Full batches in random order, of consecutive positions."""
        start = piece.first + piece.batches.start * self.batch_size
        positions = range(start, start + len(piece.batches) * self.batch_size)
        groups = grouped(self._read(order, positions, lambda position: True, counter))
        yield from shuffled_batches(groups, self.batch_size, self.shuffle_buffer, randomness)

    def _in_order(self, piece: Share, counter: BadSamples) -> Iterator[list[Placed]]:
        """The rank's own samples, batch by batch; a batch past its end is empty."""

        def batch_of(position: int) -> int:
            return (position - piece.first) // self.batch_size

        samples = self._read(
            self.shards,
            range(piece.first, piece.end),
            lambda position: batch_of(position) in piece.batches,
            counter,
        )
        by_batch = itertools.groupby(samples, key=lambda placed: batch_of(placed.position))
        number, batch = next(by_batch, (None, []))
        for wanted in piece.batches:
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
    ) -> Iterator[Placed]:
        """Raw samples, with their stored embeddings."""
        at, rows, table = None, {}, None
        for position, raw in read_positions(
            order,
            positions,
            wanted=wanted,
            pictures=self.reader.load_image,
            report=counter.record,
        ):
            embedding = None
            if self.embeddings is not None and raw.bad is None:
                if raw.shard != at:
                    at = raw.shard
                    rows, table = read_embeddings(at, self.embeddings)
                if raw.key in rows:
                    embedding = table[rows[raw.key]].clone()  # a view would keep the whole table
                else:
                    raw = raw._replace(bad=BadSample("missing embedding"))
            yield Placed(position, raw, embedding)

    def _decode(
        self, batch: list[Placed], epoch: int, end: int, counter: BadSamples
    ) -> list[list[Sample]]:
        """The crops of each picture of a batch, and fillers where the batch must have them."""
        pictures = []
        for placed in batch:
            try:
                pictures.append(self._samples(placed, epoch, valid=placed.position < end))
            except BadSample as bad:
                counter.record(placed.sample.shard, placed.sample.key, bad)
            counter.saw()
        # The ranks must stay in step: full batches in training, at least one sample otherwise.
        least = self.batch_size if self.shuffle else min(1, self.world_size - 1)
        if not pictures and least:
            pictures.append(self._stand_in(epoch))
        for number in range(least - len(pictures)):
            pictures.append([sample | {"valid": False} for sample in pictures[number]])
        return pictures

    def _samples(self, placed: Placed, epoch: int, *, valid: bool) -> list[Sample]:
        more = {"valid": valid}
        if placed.image_embedding is not None:
            more["image_embedding"] = placed.image_embedding
        return [sample | more for sample in self.reader(placed.sample, epoch=epoch)]

    def _stand_in(self, epoch: int) -> list[Sample]:
        """The first sample that can be read at all."""
        unwatched = BadSamples(1.0, self.total)
        everything = range(self.total)
        for placed in self._read(self.shards, everything, lambda position: True, unwatched):
            with contextlib.suppress(BadSample):
                return self._samples(placed, epoch, valid=False)
        raise ValueError(
            f"none of the {self.total} samples in {self.shards[0].path.parent} can be read"
        )
