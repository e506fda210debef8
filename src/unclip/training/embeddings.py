"""CLIP image embeddings of a data set, computed once and kept beside its shards."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from unclip.clip import ClipEmbedder, embed_images
from unclip.data.embeddings import missing_embeddings, write_embeddings
from unclip.data.loader import ShardLoader
from unclip.data.reader import SampleReader


def check_sizes(embedder: ClipEmbedder, sizes: Mapping[str, int]) -> None:
    """Compares a CLIP with the sizes that a configuration gives to its stages.

    Raises:
        ValueError: naming the size that differs and what to say on the command line.
    """
    for name in ("embedding_dim", "text_width", "context_length"):
        found = getattr(embedder, name)
        if found != sizes[name]:
            raise ValueError(
                f"the CLIP {embedder.fingerprint} has {name} {found}, and this stage is configured "
                f"for {sizes[name]}: add clip.{name}={found}, or take another CLIP"
            )


def embed_shards(
    embedder: ClipEmbedder,
    folders: Iterable[str | Path],
    *,
    batch_size: int = 64,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
) -> int:
    """Embeds the shards that lack this CLIP's embeddings, or have older ones; returns how many.

    A file appears when its shard is done, so that what was cut off goes on where it stopped.

    Args:
        embedder: the CLIP, on the device that it shall run on.
        folders: ROOT/SPLIT/SIZE, each with shards.
        batch_size: images that are embedded at once.
        workers: processes that decode images.
        max_bad_fraction: the part of a shard's samples that may be bad.
    """
    shards = [s for folder in folders for s in missing_embeddings(folder, embedder.fingerprint)]
    reader = SampleReader(image_size=embedder.image_size, caption="first")
    for shard in tqdm(shards, desc="CLIP embeddings", unit="shard", disable=not shards):
        loader = ShardLoader(
            [shard],
            reader,
            batch_size=batch_size,
            workers=workers,
            max_bad_fraction=max_bad_fraction,
        )
        keys, embeddings = [], []
        for batch_keys, batch_embeddings in embed_images(embedder, loader):
            keys += batch_keys
            embeddings.append(batch_embeddings)
        write_embeddings(shard, embedder.fingerprint, keys, torch.cat(embeddings))
    return len(shards)
