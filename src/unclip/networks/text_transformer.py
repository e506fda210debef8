"""A text encoder that is trained with its stage, from BPE tokens (section 2.1; GLIDE)."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from unclip.networks.causal import Block


class TextTransformer(nn.Module):
    """Tokens → hidden states; every token sees every other.

    Args:
        vocabulary_size: number of token ids.
        context_length: L, the most tokens of a caption.
        width: of the states.
        layers: its depth; with 0 the states are the tokens' embeddings, for a network that is
            itself the transformer, as the paper's prior is.
        heads: attention heads.
    """

    def __init__(
        self, *, vocabulary_size: int, context_length: int, width: int, layers: int, heads: int
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Parameter(0.01 * torch.randn(1, context_length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(
        self, tokens: Int64[Tensor, "batch length"], text_mask: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length width"]:
        """States of `tokens`; those that `text_mask` hides are seen by no other."""
        x = self.tokens(tokens) + self.positions[:, : tokens.shape[1]]
        mask = text_mask[:, None, None]
        for block in self.blocks:
            x = block(x, *block.project(x), mask)
        return self.norm(x)
