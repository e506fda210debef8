"""The common base of both priors' causal transformers: the block and the caption's prefix."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unclip.networks.layers import LayerNorm, ModuleList, attend, split_heads

Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # earlier keys and values + new ones


class Tokens(NamedTuple):
    """Consecutive tokens of each sequence.

    Attributes:
        x: input of a block, `B L W`.
        mask: which of the earlier tokens and of these the outputs see, `B 1 Q K` bool; None if only
            keys and values are needed.
        rows: the Q tokens whose outputs are needed.
    """

    x: Tensor
    mask: Tensor | None
    rows: slice = slice(None)


class Prefix(NamedTuple):
    """Keys and values of the first tokens, `B H L d` per layer, and which tokens are visible."""

    keys: list[Tensor]
    values: list[Tensor]
    mask: Bool[Tensor, "batch length"]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, followed by those of later tokens."""
        return _append(self.keys[layer], self.values[layer], k, v)


def extend_mask(
    prefix: Bool[Tensor, "batch length"], mask: Bool[Tensor, "queries queries"]
) -> Bool[Tensor, "batch 1 queries keys"]:
    """Return the mask of later tokens, which see a prefix and each other by `mask`."""
    seen = prefix[:, None].expand(-1, len(mask), -1)
    return torch.cat([seen, mask.expand(len(seen), -1, -1)], dim=2)[:, None]


def _append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)


class Block(nn.Module):
    """A pre-norm transformer block over parts of sequences, the later of which see the earlier."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of `x`, split into heads."""
        q, k, v = self.qkv(self.norm_attention(x)).chunk(3, dim=2)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(
        self, parts: Sequence[Tokens], extend: Extend | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the output of each part, and the keys and values of all tokens.

        Args:
            parts: parts of the sequences; a part sees itself and the parts before it.
            extend: appends the keys and values of the first part to those of earlier tokens.
        """
        outputs, k, v = [], torch.empty(0), torch.empty(0)
        for x, mask, rows in parts:
            q, k, v = self.project(x)
            k, v = (k, v) if extend is None else extend(k, v)
            if mask is not None:
                x = x[:, rows]
                x = x + self.out(attend(q[:, :, rows], k, v, mask))
                x = x + self.mlp(self.norm_mlp(x))
            outputs.append(x)
            extend = partial(_append, k, v)
        return outputs, k, v


class CaptionPrefixTransformer(nn.Module):
    """A causal transformer whose first tokens are [text, z_t]; subclasses add the others.

    Training takes all tokens through one block after another, so that FSDP gathers a block once.
    Sampling runs the first tokens once, and the others at each step.
    """

    text_in: nn.Linear
    text_embedding_in: nn.Linear
    positions: nn.Parameter
    blocks: ModuleList[Block]

    def prefix(self, **caption: Tensor) -> Prefix:
        """Return keys and values of [text, z_t], which do not depend on the later tokens.

        Args:
            caption: arguments of `first_tokens`.
        """
        tokens, visible = self.first_tokens(**caption)
        kept: list[tuple[Tensor, Tensor]] = []
        self.run([tokens], [None], kept=kept)
        return Prefix([keys for keys, _ in kept], [values for _, values in kept], visible)

    def first_tokens(
        self,
        text_states: Float[Tensor, "batch length text_width"],
        text_mask: Bool[Tensor, "batch length"],
        text_embedding: Float[Tensor, "batch dim"],
    ) -> tuple[Tokens, Bool[Tensor, "batch length+1"]]:
        """Return the tokens [text, z_t] and which of them later tokens see."""
        dtype = self.positions.dtype
        states = self.text_in(text_states.to(dtype))
        embedding = self.text_embedding_in(text_embedding.to(dtype))
        x = torch.cat([states, embedding[:, None]], dim=1)
        length = x.shape[1]
        visible = F.pad(text_mask, (0, 1), value=True)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = (causal & visible[:, None, :])[:, None]
        return Tokens(x + self.positions[:, :length], mask), visible

    def run(
        self,
        parts: Sequence[Tokens],
        needed: Sequence[slice | None],
        extend: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        *,
        kept: list[tuple[Tensor, Tensor]] | None = None,
    ) -> list[Tensor]:
        """Return the last block's output of each part.

        Args:
            parts: parts of the sequences; a part sees itself and the parts before it.
            needed: tokens of each part whose last output is needed; None for none of them.
            extend: `extend(layer, k, v)` appends the first part's keys and values to those of
                earlier tokens.
            kept: list that receives each block's keys and values.
        """
        for layer, block in enumerate(self.blocks):
            if layer + 1 == len(self.blocks):
                parts = [_only(rows, part) for part, rows in zip(parts, needed, strict=True)]
            outputs, k, v = block(parts, None if extend is None else partial(extend, layer))
            parts = [part._replace(x=x) for part, x in zip(parts, outputs, strict=True)]
            if kept is not None:
                kept.append((k, v))
        return [part.x for part in parts]


def _only(rows: slice | None, part: Tokens) -> Tokens:
    if rows is None or part.mask is None:
        return part._replace(mask=None)
    return Tokens(part.x, part.mask[:, :, rows], rows)
