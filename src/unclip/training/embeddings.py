"""CLIP image embeddings of a data set, computed once and stored next to its shards."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from unclip.clip import ClipEmbedder, embed_images
from unclip.data.embeddings import missing_embeddings, write_embeddings
from unclip.data.loader import ShardLoader
from unclip.data.module import ShardDataModule
from unclip.data.reader import SampleReader
from unclip.data.shards import list_shards
from unclip.training.run import one_at_a_time

Source = str | Path | Sequence[str | Path]


class Embedded(NamedTuple):
    """Number of shards that a call embedded, and of their images."""

    shards: int
    images: int


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


def embed_shards(
    embedder: ClipEmbedder,
    sources: Iterable[Source],
    *,
    rank: int = 0,
    world_size: int = 1,
    **settings: Any,
) -> Embedded:
    """Embed this rank's shards whose embeddings are missing or outdated.

    The file of a shard is written when the shard is complete, so an interrupted run resumes there.
    A shard's rank depends only on the sources, not on the progress of other ranks.

    Args:
        embedder: CLIP, on the device to run on.
        sources: folders ROOT/SPLIT/SIZE or lists of shards.
        rank: rank of this process; ranks alternate.
        world_size: number of ranks.
        settings: keyword arguments of `embed_shard`.
    """
    own = [shard for source in sources for shard in list_shards(source)][rank::world_size]
    shards = missing_embeddings(own, embedder.fingerprint) if own else []
    bar = tqdm(shards, desc="CLIP embeddings", unit="shard", disable=not shards or rank > 0)
    return Embedded(len(shards), sum(embed_shard(embedder, shard, **settings) for shard in bar))


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
    reader = SampleReader(
        image_size=embedder.image_size, caption="first", minimum_size=minimum_size
    )
    settings = {"batch_size": batch_size, "workers": workers, "max_bad_fraction": max_bad_fraction}
    loader = ShardLoader([shard], reader, **settings)
    keys, embeddings = [], []
    for batch_keys, batch_embeddings in embed_images(embedder, loader):
        keys += batch_keys
        embeddings.append(batch_embeddings)
    rows = torch.cat(embeddings) if embeddings else torch.empty(0, embedder.embedding_dim)
    write_embeddings(shard, embedder.fingerprint, keys, rows)
    return len(keys)
