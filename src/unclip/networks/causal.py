"""What causal transformers over a caption share: the block, and the keys and values of a prefix."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unclip.networks.layers import attend, split_heads


class Prefix(NamedTuple):
    """Keys and values of the first tokens, `B H L d` a layer, and which of them may be seen."""

    keys: list[Tensor]
    values: list[Tensor]
    mask: Bool[Tensor, "batch length"]


class Block(nn.Module):
    """A pre-norm transformer block whose keys and values are handed to it."""

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
        """Queries, keys and values of `x`, heads split."""
        q, k, v = self.qkv(self.norm_attention(x)).chunk(3, dim=2)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The block's output at the queries of `x`."""
        x = x + self.out(attend(q, k, v, mask))
        return x + self.mlp(self.norm_mlp(x))


def run_prefix(
    blocks: Sequence[Block],
    x: Float[Tensor, "batch length width"],
    seen: Bool[Tensor, "batch length"],
) -> Prefix:
    """Keys and values of tokens that look at themselves and at those before them which are `seen`.

    Of the last block nothing but keys and values is computed: its output would not be read.
    """
    length = x.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    mask = (causal & seen[:, None, :])[:, None]
    keys, values = [], []
    for i, block in enumerate(blocks):
        q, k, v = block.project(x)
        keys.append(k)
        values.append(v)
        if i + 1 < len(blocks):
            x = block(x, q, k, v, mask)
    return Prefix(keys, values, seen)
