"""A cache of the features of real images, keyed by data, crop and filter, and network."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unclip.evaluation.distributed import Ranks
from unclip.evaluation.features import FeatureNetwork, Features, Images, compute_features
from unclip.evaluation.protocol import Protocol, fingerprint
from unclip.evaluation.sources import Source, load_images
from unclip.files import atomic_write


def real_features(
    network: FeatureNetwork,
    source: Source,
    indices: Sequence[int],
    protocol: Protocol,
    cache: Path,
    *,
    ranks: Ranks,
    progress: bool = False,
) -> Features:
    """Compute features of some real images or load them from the cache; rank 0 gets them.

    The images are cropped and resized as the protocol says; all `ranks` share the work.
    """
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
        return torch.empty(0) if kept is None else kept

    def load(rows: range) -> Images:
        return load_images(source, [indices[k] for k in rows], protocol)

    features = compute_features(network, load, len(indices), ranks=ranks, progress=progress)
    if ranks.first:
        with atomic_write(file) as temporary:
            save_file({"features": features.contiguous()}, temporary)
    return features


def _load(file: Path, count: int) -> Features | None:
    """Load cached features; None if they are missing, truncated or too few."""
    try:
        features = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    return features if len(features) == count else None
