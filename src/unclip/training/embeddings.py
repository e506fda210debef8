"""CLIP image embeddings of a data set, computed once and kept beside its shards."""

import time
from collections.abc import Iterable, Mapping, Sequence
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
from unclip.data.shards import list_shards
from unclip.training.preparation import one_at_a_time

Source = str | Path | Sequence[str | Path]


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


def reading_of(data: ShardDataModule) -> dict[str, Any]:
    """How the embedding of a data set reads it, which is how training does."""
    names = ("workers", "minimum_size", "max_bad_fraction")
    return {name: getattr(data, name) for name in names}


def ensure_embeddings(
    embedder: ClipEmbedder, data: ShardDataModule, device: torch.device | str
) -> None:
    """Embeds, on that device, what of a data set has no embeddings; one process does it for all.

    A data set that lacks nothing is not written to.
    """
    sources = data.sources()
    if not any(missing_embeddings(source, embedder.fingerprint) for source in sources):
        return
    with one_at_a_time(data.home / "embeddings"):
        embed_shards(embedder.to(device), sources, **reading_of(data))


def embed_shards(embedder: ClipEmbedder, sources: Iterable[Source], **settings: Any) -> int:
    """Embeds the shards that lack this CLIP's embeddings, or have older ones; returns how many.

    A file appears when its shard is done, so that what was cut off goes on where it stopped.

    Args:
        embedder: the CLIP, on the device that it shall run on.
        sources: folders ROOT/SPLIT/SIZE or lists of shards.
        settings: as in `embed_shard`.
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
    """Writes the embeddings of one shard beside it; returns how many.

    Args:
        embedder: the CLIP, on the device that it shall run on.
        shard: a tar file.
        batch_size: images that are embedded at once.
        workers: processes that decode images.
        minimum_size: pictures with a shorter side are bad samples.
        max_bad_fraction: the part of the samples that may be bad.

    Raises:
        ValueError: too many bad samples.
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
    """Embeds shards on all devices of a trainer: `trainer.predict(module)`; ranks take turns.

    Args:
        embedder: the CLIP; a plain object, moved to each rank's device.
        sources: as in `embed_shards`.
        settings: as in `embed_shard`.
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
        """This rank's shards that lack embeddings; which are a rank's depends on the source alone.

        So it is the same whatever another rank has finished already.
        """
        shards = [shard for source in self.sources for shard in list_shards(source)]
        own = shards[self.trainer.global_rank :: self.trainer.world_size]
        missing = missing_embeddings(own, self.embedder.fingerprint) if own else []
        return DataLoader(missing, batch_size=None)

    def predict_step(self, shard: Path, batch_idx: int) -> int:
        """Embeds a shard; returns how many images are done so far."""
        started = time.perf_counter()
        self.images += embed_shard(self.embedder.to(self.device), shard, **self.settings)
        self.shards += 1
        self.seconds += time.perf_counter() - started
        return self.images
