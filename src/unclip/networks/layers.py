"""Layers that several networks use."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class ModuleList(nn.ModuleList, Generic[M]):
    """A `torch.nn.ModuleList` that type checkers know the element type of."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...

        def __getitem__(self, index: int) -> M: ...


def zero_(module: M) -> M:
    """Set all parameters of a module to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """Group norm in float32 at any half precision, returned in the input's dtype (as in ADM).

    The statistics of half-precision sums are poor, and PyTorch's CPU kernel for bfloat16 in
    channels_last is several times slower than the one for float32.
    """

    def forward(self, x: Float[Tensor, "batch channels *size"]) -> Tensor:
        """Normalize `x`; shape, dtype and memory format stay."""
        if x.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def as_float(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert floating-point tensors to `dtype`; masks and ids are unchanged."""
    return x.to(dtype) if x.is_floating_point() else x


def timestep_embedding(
    t: Float[Tensor, " batch"], width: int, max_period: float = 10_000.0
) -> Float[Tensor, "batch width"]:
    """Return sinusoids of the timestep, cosines first (Vaswani et al. 2017, in ADM's order)."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepMLP(nn.Sequential):
    """Timestep → sinusoids → Linear, SiLU, Linear."""

    def __init__(self, sinusoids: int, width: int):
        super().__init__(nn.Linear(sinusoids, width), nn.SiLU(), nn.Linear(width, width))
        self.sinusoids = sinusoids

    def forward(self, t: Tensor) -> Float[Tensor, "batch width"]:
        """Embed timesteps."""
        embedding = timestep_embedding(t, self.sinusoids)
        return super().forward(embedding.to(next(self.parameters()).dtype))


def split_heads(x: Float[Tensor, "batch length width"], heads: int) -> Tensor:
    """Reshape `B L (H d)` to `B H L d`."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def attend(
    q: Float[Tensor, "batch heads queries depth"],
    k: Float[Tensor, "batch heads keys depth"],
    v: Float[Tensor, "batch heads keys depth"],
    mask: Bool[Tensor, "batch #heads #queries keys"] | None = None,
) -> Float[Tensor, "batch queries width"]:
    """Compute softmax attention and join the heads; `mask` is true at visible keys."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
