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
from unclip.data.loader import ShardLoader
from unclip.data.reader import SampleReader
from unclip.data.shards import list_shards

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


def embed_shards(
    embedder: ClipEmbedder,
    sources: Iterable[Source],
    *,
    batch_size: int = 64,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
) -> int:
    """Embeds the shards that lack this CLIP's embeddings, or have older ones; returns how many.

    A file appears when its shard is done, so that what was cut off goes on where it stopped.

    Args:
        embedder: the CLIP, on the device that it shall run on.
        sources: folders ROOT/SPLIT/SIZE or lists of shards.
        batch_size: images that are embedded at once.
        workers: processes that decode images.
        max_bad_fraction: the part of a shard's samples that may be bad.
    """
    shards = [s for source in sources for s in missing_embeddings(source, embedder.fingerprint)]
    settings = {"batch_size": batch_size, "workers": workers, "max_bad_fraction": max_bad_fraction}
    for shard in tqdm(shards, desc="CLIP embeddings", unit="shard", disable=not shards):
        embed_shard(embedder, shard, **settings)
    return len(shards)


def embed_shard(
    embedder: ClipEmbedder, shard: Path, *, batch_size: int = 64, **settings: Any
) -> int:
    """Writes the embeddings of one shard beside it; returns how many. See `embed_shards`."""
    reader = SampleReader(image_size=embedder.image_size, caption="first")
    keys, embeddings = [], []
    loader = ShardLoader([shard], reader, batch_size=batch_size, **settings)
    for batch_keys, batch_embeddings in embed_images(embedder, loader):
        keys += batch_keys
        embeddings.append(batch_embeddings)
    write_embeddings(shard, embedder.fingerprint, keys, torch.cat(embeddings))
    return len(keys)


class ShardEmbedding(LightningModule):
    """Embeds shards on all devices of a trainer: `trainer.predict(module)`; ranks take turns.

    Args:
        embedder: the CLIP; a plain object, moved to each rank's device.
        sources: as in `embed_shards`, as is what else is given.
    """

    def __init__(self, embedder: ClipEmbedder, sources: Iterable[Source], **settings: Any):
        super().__init__()
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
