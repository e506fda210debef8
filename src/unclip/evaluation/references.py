"""Features of real pictures, kept by what decides about them: the data, the protocol, the network.

The files are safetensors; a change of the data, of the crop, of the filter or of the network makes
another one.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from unclip.evaluation.networks import FeatureNetwork
from unclip.evaluation.protocol import Protocol, fingerprint
from unclip.evaluation.ranks import Ranks
from unclip.evaluation.sources import Source, stack

FEATURE_BATCH = 64


def features_of(
    network: FeatureNetwork,
    load: Callable[[range], Tensor],
    count: int,
    *,
    ranks: Ranks,
    device: torch.device,
    progress: bool = False,
    batch_size: int = FEATURE_BATCH,
) -> Float[Tensor, "count features"] | None:
    """Features of `count` pictures, on rank 0; None on the others.

    Args:
        network: on `device`.
        load: pictures of some rows, as bytes.
        count: how many there are.
        ranks: the processes that share the work.
        device: where the network lies.
        progress: show a bar.
        batch_size: pictures at a time, and what ranks take turns at.
    """
    blocks = ranks.blocks(count, batch_size)
    bar = tqdm(
        blocks,
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
    ranks: Ranks,
    device: torch.device,
    progress: bool = False,
) -> Float[Tensor, "count features"] | None:
    """Features of some of a source's pictures, from the cache where it has them; on rank 0.

    Raises:
        ValueError: a picture is damaged.
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
    kept = _read(file, len(indices)) if ranks.first else None
    if ranks.share(kept is not None):
        return kept

    def load(block: range) -> Tensor:
        return stack(source, [indices[k] for k in block], protocol)

    features = features_of(
        network, load, len(indices), ranks=ranks, device=device, progress=progress
    )
    if ranks.first:
        _write(file, features)
    return features


def _read(file: Path, count: int) -> Tensor | None:
    try:
        features = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None  # not there, or cut off
    return features if len(features) == count else None


def _write(file: Path, features: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        save_file({"features": features.contiguous()}, unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
