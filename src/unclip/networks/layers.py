"""Layers that several networks use."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

M = TypeVar("M", bound=nn.Module)


class ModuleList(nn.ModuleList, Generic[M]):
    """A `torch.nn.ModuleList` whose elements have a static type."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[M]: ...

        def __getitem__(self, index: int) -> M: ...


def zero_(module: M) -> M:
    """Set all parameters of a module to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """Group norm that computes half-precision inputs in float32, as in ADM.

    Half-precision sums give inaccurate statistics, and PyTorch's CPU kernel for bfloat16 in
    channels_last is several times slower than the one for float32. CUDA's kernel only takes and
    returns contiguous memory; the conversions from and to channels_last are merged with the casts.
    """

    def forward(self, x: Float[Tensor, "batch channels *size"]) -> Tensor:
        """Normalize `x`; its shape, dtype and memory format stay."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if wide == x.dtype and not x.is_cuda:
            return super().forward(x)
        inner = outer = torch.preserve_format
        channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if x.is_cuda and channels_last and not torch.compiler.is_compiling():
            inner, outer = torch.contiguous_format, torch.channels_last
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(wide, memory_format=inner)
            h = F.group_norm(h, self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
            return h.to(x.dtype, memory_format=outer)


class LayerNorm(nn.LayerNorm):
    """Layer norm whose weights may have another dtype than its input: FSDP gathers bfloat16."""

    def forward(self, x: Float[Tensor, "*batch width"]) -> Tensor:
        """Normalize `x`; its dtype stays."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class TimestepMLP(nn.Sequential):
    """Timestep → sinusoids, cosines first (ADM) → Linear, SiLU, Linear."""

    def __init__(self, sinusoids: int, width: int):
        super().__init__(nn.Linear(sinusoids, width), nn.SiLU(), nn.Linear(width, width))
        self.sinusoids = sinusoids

    def forward(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Embed timesteps, with wavelengths from 2π to 2π · 10,000."""
        half = self.sinusoids // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * k / half)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
        return super().forward(embedding.to(next(self.parameters()).dtype))


def split_heads(x: Float[Tensor, "batch length width"], heads: int) -> Tensor:
    """Reshape `B L (H d)` to `B H L d`."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def has_slow_attention(x: Tensor) -> bool:
    """Return whether PyTorch's fused attention in bfloat16 is slow on the device of `x`: on a CPU.

    Its backward takes two to nine times as long as in float32 at up to 300 tokens. Fake tensors on
    a CPU represent those of a GPU (the planner).
    """
    return x.is_cpu and not isinstance(x, FakeTensor)


def attend(
    q: Float[Tensor, "batch heads queries depth"],
    k: Float[Tensor, "batch heads keys depth"],
    v: Float[Tensor, "batch heads keys depth"],
    mask: Bool[Tensor, "batch #heads #queries keys"] | None = None,
) -> Float[Tensor, "batch queries width"]:
    """Compute softmax attention and join the heads; `mask` is true at visible keys."""
    dtype = q.dtype
    if dtype == torch.bfloat16 and has_slow_attention(q):
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.to(dtype).transpose(1, 2).flatten(2)
