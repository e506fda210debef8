"""CLIP image embeddings of a data set, computed once and stored next to its shards."""

from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from unclip.clip import ClipEmbedder
from unclip.data.embeddings import missing_embeddings, write_embeddings
from unclip.data.loader import ShardDataset, ShardLoader
from unclip.data.module import ShardDataModule
from unclip.data.reader import SampleReader
from unclip.data.shards import list_shards
from unclip.training.run import one_at_a_time


class Embedded(NamedTuple):
    """Number of shards that a call embedded, and of their images."""

    shards: int
    images: int


def ensure_embeddings(
    embedder: ClipEmbedder, data: ShardDataModule, device: torch.device | str
) -> None:
    """Embed the shards that have no embeddings on `device`; one process does it for all.

    Nothing is written to a complete data set.
    """
    if any(missing_embeddings(source, embedder.fingerprint) for source in data.sources()):
        with one_at_a_time(data.home / "embeddings"):
            embed_shards(embedder.to(device), data)


def embed_shards(
    embedder: ClipEmbedder, data: ShardDataModule, *, rank: int = 0, world_size: int = 1
) -> Embedded:
    """Embed this rank's shards whose embeddings are missing or outdated.

    The samples that training accepts are embedded. A shard's rank depends only on the data, not on
    the progress of other ranks. An interrupted run resumes at the shard where it stopped.

    Args:
        embedder: CLIP, on the device to run on.
        data: data set whose training and validation splits are embedded.
        rank: rank of this process; ranks alternate.
        world_size: number of ranks.

    Raises:
        ValueError: there are too many bad samples.
    """
    shards = [shard for source in data.sources() for shard in list_shards(source)]
    own = shards[rank::world_size]
    missing = missing_embeddings(own, embedder.fingerprint) if own else []
    silent = not missing or rank > 0
    bar = tqdm(missing, desc="CLIP embeddings", unit="shard", disable=silent)
    return Embedded(len(missing), sum(_embed_shard(embedder, shard, data) for shard in bar))


def _embed_shard(embedder: ClipEmbedder, shard: Path, data: ShardDataModule) -> int:
    """Write the embeddings of a shard next to it, and return their number."""
    size, bad = data.minimum_size, data.max_bad_fraction
    reader = SampleReader(image_size=embedder.image_size, random=False, minimum_size=size)
    dataset = ShardDataset([shard], reader, batch_size=64, max_bad_fraction=bad)
    loader = ShardLoader(dataset, workers=data.workers)
    keys, embeddings = [], [torch.empty(0, embedder.embedding_dim)]
    for batch in loader:
        keys += batch["key"]
        embeddings.append(embedder.image(batch["image"]).cpu())
    write_embeddings(shard, embedder.fingerprint, keys, torch.cat(embeddings))
    return len(keys)
