"""Noise that belongs to the sample.

One generator an image, so that its picture never depends on the batch or the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def randn(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise `[len(generators), *shape]`, row k drawn by generator k on the CPU."""
    rows = [torch.randn(tuple(shape), generator=generator) for generator in generators]
    return torch.stack(rows).to(device)
