"""Features of many images, shared by all ranks, and a cache of those of real images.

The cache is keyed by the data, the protocol's crop and filter, and the network.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from unclip.evaluation.distributed import Ranks
from unclip.evaluation.features import FeatureNetwork
from unclip.evaluation.protocol import Protocol, fingerprint
from unclip.evaluation.sources import Source, load_images
from unclip.files import atomic_write

FEATURE_BATCH = 64


def compute_features(
    network: FeatureNetwork,
    load: Callable[[range], Tensor],
    count: int,
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    progress: bool = False,
    batch_size: int = FEATURE_BATCH,
) -> Float[Tensor, "count features"] | None:
    """Compute the features of `count` images; rank 0 gets them, the others get None.

    Args:
        network: the network, on `device`.
        load: loads a range of images as uint8.
        count: number of images.
        device: device of the network.
        ranks: the processes that share the work.
        progress: show a bar.
        batch_size: number of images per batch, and the unit that ranks share.
    """
    ranks = ranks or Ranks()
    bar = tqdm(
        ranks.blocks(count, batch_size),
        desc=f"features of {network.name}",
        unit="batch",
        leave=False,
        disable=not (progress and ranks.first),
    )
    own = {block.start: network(load(block).to(device)).cpu() for block in bar}
    gathered = ranks.gather(own)
    if gathered is None:
        return None
    parts = {start: rows for rank in gathered for start, rows in rank.items()}
    return torch.cat([parts[start] for start in sorted(parts)])


def real_features(
    network: FeatureNetwork,
    source: Source,
    indices: Sequence[int],
    protocol: Protocol,
    cache: Path,
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> Float[Tensor, "count features"] | None:
    """Compute features of some of a source's images or load them from the cache; rank 0 gets them.

    Args:
        network: the network, on `device`.
        source: the images.
        indices: which of them.
        protocol: how they are cropped and resized.
        cache: folder of the cache.
        device: device of the network.
        ranks: the processes that share the work.
        progress: show a bar.

    Raises:
        ValueError: an image is damaged.
    """
    ranks = ranks or Ranks()
    indices = sorted(indices)
    key = fingerprint(
        [
            source.stamp,
            indices if indices != list(range(len(indices))) else len(indices),
            [protocol.resolution, protocol.crop, protocol.filter],
            [network.name, network.fingerprint],
        ]
    )
    file = cache / f"{network.name}-{key}.safetensors"
    kept = _load(file, len(indices)) if ranks.first else None
    if ranks.share(kept is not None):
        return kept

    def load(rows: range) -> Tensor:
        return load_images(source, [indices[k] for k in rows], protocol)

    shared = {"device": device, "ranks": ranks, "progress": progress}
    features = compute_features(network, load, len(indices), **shared)
    if ranks.first:
        with atomic_write(file) as temporary:
            save_file({"features": features.contiguous()}, temporary)
    return features


def _load(file: Path, count: int) -> Tensor | None:
    """Load cached features; None if they are missing, truncated or too few."""
    try:
        features = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    return features if len(features) == count else None
