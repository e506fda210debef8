"""Noise that belongs to the sample: one generator an image, so that its picture never depends on
the batch or the device that it is drawn in."""

from collections.abc import Sequence

import torch
from torch import Tensor


def randn(
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise of `[len(generators), *shape]`, row k drawn from generator k on the CPU."""
    rows = [torch.randn(tuple(shape), generator=generator) for generator in generators]
    return torch.stack(rows).to(device)
