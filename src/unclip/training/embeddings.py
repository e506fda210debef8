"""CLIP image embeddings of a data set, computed once and stored next to its shards."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader
from tqdm import tqdm

from unclip.clip import ClipEmbedder, embed_images
from unclip.data.embeddings import missing_embeddings, write_embeddings
from unclip.data.loader import ShardDataset, ShardLoader
from unclip.data.module import ShardDataModule
from unclip.data.reader import SampleReader
from unclip.data.shards import Source, list_shards
from unclip.training.run import one_at_a_time


def reader_settings(data: ShardDataModule) -> dict[str, Any]:
    """Return the arguments of `embed_shard` with which it accepts the same samples as training."""
    names = ("workers", "minimum_size", "max_bad_fraction")
    return {name: getattr(data, name) for name in names}


def ensure_embeddings(
    embedder: ClipEmbedder, data: ShardDataModule, device: torch.device | str
) -> None:
    """Embed the shards that have no embeddings on `device`; one process does it for all.

    Nothing is written to a complete data set.
    """
    sources = data.sources()
    if not any(missing_embeddings(source, embedder.fingerprint) for source in sources):
        return
    with one_at_a_time(data.home / "embeddings"):
        embed_shards(embedder.to(device), sources, **reader_settings(data))


def embed_shards(embedder: ClipEmbedder, sources: Iterable[Source], **settings: Any) -> int:
    """Embed the shards whose embeddings are missing or outdated, and return their number.

    The file of a shard is written when the shard is complete, so an interrupted run resumes there.

    Args:
        embedder: CLIP, on the device to run on.
        sources: folders ROOT/SPLIT/SIZE or lists of shards.
        settings: keyword arguments of `embed_shard`.
    """
    shards = [s for source in sources for s in missing_embeddings(source, embedder.fingerprint)]
    for shard in tqdm(shards, desc="CLIP embeddings", unit="shard", disable=not shards):
        embed_shard(embedder, shard, **settings)
    return len(shards)


def embed_shard(
    embedder: ClipEmbedder,
    shard: Path,
    *,
    batch_size: int = 64,
    workers: int = 0,
    minimum_size: int = 16,
    max_bad_fraction: float = 0.01,
) -> int:
    """Write the embeddings of a shard next to it, and return their number.

    Args:
        embedder: CLIP, on the device to run on.
        shard: tar file.
        batch_size: number of images per batch.
        workers: number of processes that decode images.
        minimum_size: images with a shorter side count as bad samples.
        max_bad_fraction: tolerated fraction of bad samples.

    Raises:
        ValueError: there are too many bad samples.
    """
    reader = SampleReader(image_size=embedder.image_size, random=False, minimum_size=minimum_size)
    keys, embeddings = [], []
    dataset = ShardDataset(
        [shard], reader, batch_size=batch_size, max_bad_fraction=max_bad_fraction
    )
    loader = ShardLoader(dataset, workers=workers)
    for batch_keys, batch_embeddings in embed_images(embedder, loader):
        keys += batch_keys
        embeddings.append(batch_embeddings)
    rows = torch.cat(embeddings) if embeddings else torch.empty(0, embedder.embedding_dim)
    write_embeddings(shard, embedder.fingerprint, keys, rows)
    return len(keys)


class ShardEmbedding(LightningModule):
    """Embed shards on all devices of a trainer: `trainer.predict(module)`; ranks alternate.

    Args:
        embedder: CLIP; a plain object that is moved to each rank's device.
        sources: folders ROOT/SPLIT/SIZE or lists of shards.
        settings: keyword arguments of `embed_shard`.
    """

    def __init__(self, embedder: ClipEmbedder, sources: Iterable[Source], **settings: Any):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.embedder = embedder
        self.sources = list(sources)
        self.settings = settings
        self.shards = 0
        self.images = 0
        self.seconds = 0.0

    def predict_dataloader(self) -> DataLoader:
        """Return this rank's shards that lack embeddings.

        The assignment depends only on the source, not on the progress of other ranks.
        """
        shards = [shard for source in self.sources for shard in list_shards(source)]
        own = shards[self.trainer.global_rank :: self.trainer.world_size]
        missing = missing_embeddings(own, self.embedder.fingerprint) if own else []
        return DataLoader(missing, batch_size=None)

    def predict_step(self, shard: Path, batch_idx: int) -> int:
        """Embed a shard, and return the number of images so far."""
        started = time.perf_counter()
        self.images += embed_shard(self.embedder.to(self.device), shard, **self.settings)
        self.shards += 1
        self.seconds += time.perf_counter() - started
        return self.images
