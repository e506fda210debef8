"""The diffusion prior's causal transformer over [text, z_t, t, noised z_i, query] (section 2.2).

Attention is causal and t comes after the text, so the prefix [text, z_t] does not depend on the
diffusion step. The network therefore has two halves: `prefix` runs once per caption, `suffix` runs
the other three tokens once per step, or for several noised embeddings of one caption at once.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unclip.networks.causal import Block, CaptionPrefixTransformer, Prefix, Tokens, extend_mask
from unclip.networks.layers import ModuleList, TimestepMLP

SUFFIX = 3  # timestep, noised image embedding, query
QUERIES = slice(SUFFIX - 1, None, SUFFIX)


class PriorTransformer(CaptionPrefixTransformer):
    """Predict an image embedding from a noised one, a timestep and a caption.

    Args:
        embedding_dim: D, width of image and text embeddings.
        text_width: width of the text states.
        context_length: L, number of tokens of a caption.
        width: width of the transformer.
        layers: number of blocks.
        heads: number of attention heads.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        text_width: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
    ):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.text_in = nn.Linear(text_width, width)
        self.text_embedding_in = nn.Linear(embedding_dim, width)
        self.time = TimestepMLP(width, width)
        self.image_in = nn.Linear(embedding_dim, width)
        self.query = nn.Parameter(0.01 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.01 * torch.randn(1, context_length + 1 + SUFFIX, width))
        self.blocks = ModuleList[Block](Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, embedding_dim)

    def suffix(
        self,
        prefix: Prefix,
        x_t: Float[Tensor, "batch noises dim"],
        t: Float[Tensor, "batch noises"],
    ) -> Float[Tensor, "batch noises dim"]:
        """Return the prediction for each of a caption's noised embeddings, independently."""
        (x,) = self.run([self._last_tokens(x_t, t, prefix.mask)], [QUERIES], prefix.extend)
        return self.out(self.norm_out(x))

    def forward(
        self,
        x_t: Float[Tensor, "batch noises dim"],
        t: Float[Tensor, "batch noises"],
        **caption: Tensor,
    ) -> Float[Tensor, "batch noises dim"]:
        """Return `suffix` of `prefix` in one pass; `caption` are the arguments of `prefix`."""
        tokens, visible = self.first_tokens(**caption)
        _, x = self.run([tokens, self._last_tokens(x_t, t, visible)], [None, QUERIES])
        return self.out(self.norm_out(x))

    def _last_tokens(self, x_t: Tensor, t: Tensor, visible: Tensor) -> Tokens:
        batch, noises, _ = x_t.shape
        time = self.time(t.reshape(-1)).unflatten(0, (batch, noises))  # (B, N, W)
        image = self.image_in(x_t.to(self.query.dtype))
        x = torch.stack([time, image, self.query.expand_as(time)], dim=2)  # (B, N, 3, W)
        x = (x + self.positions[:, None, -SUFFIX:]).flatten(1, 2)  # (B, 3N, W)
        causal = torch.ones(SUFFIX, SUFFIX, device=x.device).tril()
        mask = torch.eye(noises, device=x.device).kron(causal).bool()
        return Tokens(x, extend_mask(visible, mask))
