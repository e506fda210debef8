"""Turn shards into batches, with or without Lightning; one iteration is one epoch of one rank.

webdataset cannot resume inside an epoch (its issue #234), and its splitting by shards leaves ranks
with unequal numbers of batches (#225). Here ranks and workers split positions instead of shards.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, InitVar, dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from unclip.batch import Batch
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
from unclip.data.reader import Sample, SampleReader
from unclip.data.shards import Shard, Source, open_shards, read_positions


@dataclass(eq=False)
class ShardDataset(IterableDataset):
    """The samples of some shards as batches; one iteration is one epoch of one rank.

    With `shuffle` (training), every batch is full and every epoch has a new order. Each sample
    occurs once per epoch, with two exceptions: the last batch of a rank is filled with samples of
    other ranks (see `partition`), and a bad sample is replaced by another one of its batch. Without
    `shuffle`, every sample occurs exactly once, in the order of the shards and in the same batches
    for any number of workers; bad samples are left out and the last batch is smaller. All ranks
    yield the same number of batches: a rank without samples left yields a padding sample.

    A batch has `key`, `caption`, `valid` and, depending on the reader and `embeddings`, `image`,
    `low_res` and `image_embedding`.

    With `crops_per_image` = n, `batch_size` decoded images make n batches, each with one crop of
    every image.

    Args:
        source: folder ROOT/SPLIT/SIZE, tar file, or list of tar files.
        reader: turns raw samples into training samples.
        batch_size: number of samples in a batch of this rank.
        shuffle: whether to shuffle, for training.
        rank: this process's rank, passed in because spawned workers do not know it.
        world_size: number of ranks that share an epoch.
        shuffle_buffer: number of raw samples in the shuffle buffer.
        embeddings: fingerprint of the CLIP whose stored image embeddings are added.
        max_bad_fraction: tolerated fraction of bad samples per worker and epoch.

    Raises:
        FileNotFoundError: shards or embeddings are missing.
        ValueError: there are no samples; during the iteration: too many samples are bad.
    """

    source: InitVar[Source]
    reader: SampleReader
    _: KW_ONLY
    batch_size: int
    shuffle: bool = False
    rank: int = 0
    world_size: int = 1
    shuffle_buffer: int = 1000
    embeddings: str | None = None
    max_bad_fraction: float = 0.01

    def __post_init__(self, source: Source):
        assert self.batch_size >= 1 and 0 <= self.rank < self.world_size
        if self.embeddings is not None:
            check_embeddings(source, self.embeddings)
        self.shards = open_shards(source)
        self.total = sum(shard.samples for shard in self.shards)
        if not self.total:
            raise ValueError(f"the shards in {source} hold no samples")
        # The epoch and the number of batches to skip, in memory shared with running workers.
        self._progress = torch.zeros(2, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._progress[0] = epoch

    def skip(self, batches: int) -> None:
        """Set the number of batches to skip in the next iteration, which were consumed before."""
        self._progress[1] = batches

    def __len__(self) -> int:
        raw_batches = batches_per_rank(self.total, self.batch_size, self.world_size)
        return raw_batches * self.reader.crops_per_image

    def __iter__(self) -> Iterator[Batch]:
        epoch, consumed = self._progress.tolist()
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        crops = self.reader.crops_per_image
        lengths = [len(self._partition(one, workers).batches) * crops for one in range(workers)]
        skips, turn = round_robin_state(lengths, consumed)
        number = (number + turn) % workers  # DataLoader starts with worker 0: make it the next one
        return self._batches(epoch if self.shuffle else 0, number, workers, skip=skips[number])

    def _partition(self, worker: int, workers: int) -> Partition:
        return partition(
            self.total,
            self.batch_size,
            rank=(self.rank, self.world_size),
            worker=(worker, workers),
            interleaved=not self.shuffle,
        )

    def _batches(self, epoch: int, worker: int, workers: int, *, skip: int = 0) -> Iterator[Batch]:
        """Yield a worker's batches, without the first `skip`."""
        part = self._partition(worker, workers)
        skip, crops_done = divmod(skip, self.reader.crops_per_image)
        counter = BadSamples(self.max_bad_fraction, len(part.batches) * self.batch_size)
        if self.shuffle:
            order = epoch_order(self.shards, self.reader.seed, epoch)
            start = part.first + part.batches.start * self.batch_size
            positions = range(start, start + len(part.batches) * self.batch_size)
            groups = group_twins(self._read(order, positions, counter))
            generator = rng("samples", self.reader.seed, epoch, self.rank, worker)
            raw_batches = shuffled_batches(groups, self.batch_size, self.shuffle_buffer, generator)
        else:
            raw_batches = self._in_order(part, counter)
        for raw_batch in itertools.islice(raw_batches, skip, None):
            crops_of_images = self._decode(raw_batch, epoch, part.end, counter)
            first, crops_done = crops_done, 0
            for number in range(first, self.reader.crops_per_image if crops_of_images else 0):
                yield default_collate([crops[number] for crops in crops_of_images])
        counter.finish()

    def _in_order(self, part: Partition, counter: BadSamples) -> Iterator[list[PositionedSample]]:
        """Yield the rank's own samples in batches; a batch beyond its last sample is empty."""

        def batch_of(position: int) -> int:
            return (position - part.first) // self.batch_size

        positions = range(part.first, part.end)
        samples = self._read(
            self.shards, positions, counter, lambda position: batch_of(position) in part.batches
        )
        batches = itertools.groupby(samples, lambda sample: batch_of(sample.position))
        for _ in part.batches:
            _, batch = next(batches, (None, ()))
            yield list(batch)

    def _read(
        self,
        order: list[Shard],
        positions: range,
        counter: BadSamples,
        wanted: Callable[[int], bool] = lambda position: True,
    ) -> Iterator[PositionedSample]:
        """Yield raw samples with their stored embeddings."""
        current, rows, table = None, {}, torch.empty(0)
        settings = {"images": self.reader.load_image, "report": counter.record}
        for position, raw in read_positions(order, positions, wanted=wanted, **settings):
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
        extra: Sample = {"valid": valid}
        if positioned.image_embedding is not None:
            extra["image_embedding"] = positioned.image_embedding
        return [sample | extra for sample in self.reader(positioned.sample, epoch=epoch)]

    def _padding(self, epoch: int) -> list[Sample]:
        """Return the first sample of the source that can be decoded, marked as padding."""
        uncounted = BadSamples(1.0, self.total)
        for positioned in self._read(self.shards, range(self.total), uncounted):
            with contextlib.suppress(BadSample):
                return self._samples(positioned, epoch, valid=False)
        raise ValueError(
            f"none of the {self.total} samples in {self.shards[0].path.parent} can be read"
        )


def _outlive_signals(_: int) -> None:
    """Keep Ctrl-C and SIGTERM from a worker, which the run needs until its step is saved.

    SLURM, systemd and containers send SIGTERM to all processes; only the parent's ends a worker.
    """
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class ShardLoader:
    """Load the batches of a `ShardDataset` in worker processes, or in this one if `workers` is 0.

    `state_dict` holds the number of batches consumed in the epoch. A loader that loads it yields
    the rest of the epoch, bit for bit: it reads the skipped samples but does not decode them.
    """

    def __init__(self, dataset: ShardDataset, *, workers: int = 0):
        self._dataset = dataset  # a public one would be inspected by Lightning
        self.batch_size = dataset.batch_size
        self.sampler = dataset  # Lightning sets the epoch of a loader's sampler
        self.batch_sampler = None  # Lightning reads it if there is a sampler
        self._yielded = 0  # batches of the current epoch, including skipped ones
        self._skipped = 0  # batches to skip in the next iteration
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # otherwise every epoch would advance the global one
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; without `shuffle` all epochs are equal."""
        self._dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches consumed in this epoch."""
        return {"batches": self._yielded}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Skip the consumed batches in the next iteration."""
        self._skipped = state_dict["batches"]

    def __iter__(self) -> Iterator[Batch]:
        # A generator: workers start (and read the epoch) at the first batch, by which time
        # Lightning, which creates the iterator earlier, has set the epoch.
        self._yielded, self._skipped = self._skipped, 0
        self._dataset.skip(self._yielded)
        for batch in self._loader:
            self._yielded += 1
            yield batch
