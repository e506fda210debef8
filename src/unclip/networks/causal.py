"""The common base of both priors' causal transformers: the block and the caption's prefix."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unclip.networks.layers import ModuleList, attend, split_heads


class Prefix(NamedTuple):
    """Keys and values of the first tokens, `B H L d` per layer, and which tokens are visible."""

    keys: list[Tensor]
    values: list[Tensor]
    mask: Bool[Tensor, "batch length"]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, followed by those of later tokens."""
        return torch.cat([self.keys[layer], k], dim=2), torch.cat([self.values[layer], v], dim=2)

    def extend_mask(
        self, mask: Bool[Tensor, "queries queries"]
    ) -> Bool[Tensor, "batch 1 queries keys"]:
        """Return the mask of later tokens, which see the prefix and each other by `mask`."""
        seen = self.mask[:, None].expand(-1, len(mask), -1)
        return torch.cat([seen, mask.expand(len(seen), -1, -1)], dim=2)[:, None]


class Block(nn.Module):
    """A pre-norm transformer block that receives its keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of `x`, split into heads."""
        q, k, v = self.qkv(self.norm_attention(x)).chunk(3, dim=2)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Return the block's output at the queries of `x`."""
        x = x + self.out(attend(q, k, v, mask))
        return x + self.mlp(self.norm_mlp(x))


def run_prefix(
    blocks: ModuleList[Block],
    x: Float[Tensor, "batch length width"],
    visible: Bool[Tensor, "batch length"],
) -> Prefix:
    """Return the keys and values of tokens that attend causally to `visible` tokens.

    The last block computes only keys and values, since its output is not used.
    """
    length = x.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    mask = (causal & visible[:, None, :])[:, None]
    keys, values = [], []
    for i, block in enumerate(blocks):
        q, k, v = block.project(x)
        keys.append(k)
        values.append(v)
        if i + 1 < len(blocks):
            x = block(x, q, k, v, mask)
    return Prefix(keys, values, visible)


class CaptionPrefixTransformer(nn.Module):
    """A causal transformer whose first tokens are [text, z_t]; subclasses add the others."""

    text_in: nn.Linear
    text_embedding_in: nn.Linear
    positions: nn.Parameter
    blocks: ModuleList[Block]

    def prefix(
        self,
        text_states: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"],
        text_embedding: Float[Tensor, "batch dim"],
    ) -> Prefix:
        """Return keys and values of [text, z_t], which do not depend on the later tokens."""
        dtype = self.positions.dtype
        states = self.text_in(text_states.to(dtype))
        embedding = self.text_embedding_in(text_embedding.to(dtype))
        x = torch.cat([states, embedding[:, None]], dim=1)
        x = x + self.positions[:, : x.shape[1]]
        return run_prefix(self.blocks, x, F.pad(text_mask, (0, 1), value=True))
