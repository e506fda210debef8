"""A text encoder that is trained with its stage (section 2.1; GLIDE)."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from unclip.networks.causal import Block, Tokens
from unclip.networks.layers import ModuleList


class TextTransformer(nn.Module):
    """BPE tokens → hidden states, with bidirectional attention.

    Args:
        vocabulary_size: number of token ids.
        context_length: L, maximum number of tokens of a caption.
        width: width of the states.
        layers: number of blocks; with 0 the states are the token embeddings, for a network that is
            itself the transformer, such as the paper's prior.
        heads: number of attention heads.
    """

    def __init__(
        self, *, vocabulary_size: int, context_length: int, width: int, layers: int, heads: int
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Parameter(0.01 * torch.randn(1, context_length, width))
        self.blocks = ModuleList[Block](Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(
        self, tokens: Int64[Tensor, "batch length"], text_mask: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length width"]:
        """Return the states of `tokens`; tokens where `text_mask` is false are not attended to."""
        x = self.tokens(tokens) + self.positions[:, : tokens.shape[1]]
        mask = text_mask[:, None, None]
        for block in self.blocks:
            (x,), _, _ = block([Tokens(x, mask)])
        return self.norm(x)
