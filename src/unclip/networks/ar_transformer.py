"""The autoregressive prior's causal transformer over [text, z_t, dot product, components].

Section 2.2: an image embedding is represented by the codes of its principal components, one token
each, after a prefix of the caption, its embedding z_t and the code of the target dot product
z_i · z_t. The output at the dot product predicts the first component, the output at each component
the next one. A code is the index of a bucket.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unclip.networks.causal import Block, CaptionPrefixTransformer, Prefix, Tokens, extend_mask
from unclip.networks.layers import ModuleList


class Cache:
    """Keys and values of a prefix and of the tokens that follow it.

    Args:
        prefix: prefix of each caption.
        copies: number of sequences per caption.
        room: maximum number of tokens that follow.

    Attributes:
        length: number of tokens in the cache.
        mask: true at visible tokens, one row per sequence.
    """

    def __init__(self, prefix: Prefix, copies: int, room: int):
        self.length = prefix.mask.shape[1]
        self.mask = F.pad(prefix.mask, (0, room), value=True).repeat_interleave(copies, dim=0)
        self._keys = [self._with_room(keys, copies, room) for keys in prefix.keys]
        self._values = [self._with_room(values, copies, room) for values in prefix.values]

    @staticmethod
    def _with_room(prefix: Tensor, copies: int, room: int) -> Tensor:
        batch, heads, length, depth = prefix.shape
        roomy = prefix.new_empty(batch, copies, heads, length + room, depth)
        roomy[..., :length, :] = prefix[:, None]
        return roomy.flatten(0, 1)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one token's keys and values to a layer and return all of the layer's."""
        end = self.length + 1
        self._keys[layer][:, :, self.length : end] = k
        self._values[layer][:, :, self.length : end] = v
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]


class ARTransformer(CaptionPrefixTransformer):
    """Predict the codes of an image embedding's components, one after another.

    Args:
        embedding_dim: D, width of image and text embeddings.
        text_width: width of the text states.
        context_length: L, number of tokens of a caption.
        components: K, number of principal components per image embedding (the paper: 319).
        buckets: number of codes per component and dot product (the paper: 1024).
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
        components: int,
        buckets: int,
        width: int,
        layers: int,
        heads: int,
    ):
        super().__init__()
        self.embedding_dim = embedding_dim
        self.components = components
        self.buckets = buckets
        self.text_in = nn.Linear(text_width, width)
        self.text_embedding_in = nn.Linear(embedding_dim, width)
        self.dot_product_in = nn.Embedding(buckets, width)
        self.component_in = nn.Embedding(buckets, width)
        self.positions = nn.Parameter(0.01 * torch.randn(1, context_length + 1 + components, width))
        self.blocks = ModuleList[Block](Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, buckets)
        with torch.no_grad():
            self.dot_product_in.weight.copy_(0.02 * _smooth_rows(buckets, width))
            self.component_in.weight.copy_(0.02 * _smooth_rows(buckets, width))
            self.out.weight.copy_(_smooth_rows(buckets, width) / width**0.5)

    def forward(
        self,
        dot_product: Int64[Tensor, " batch"],
        codes: Int64[Tensor, "batch components"],
        **caption: Tensor,
    ) -> Float[Tensor, "batch components buckets"]:
        """Return the logits of every component's code given the earlier codes, in one pass.

        Args:
            dot_product: codes of the dot products.
            codes: codes of the components.
            caption: arguments of `prefix`.
        """
        tokens, visible = self.first_tokens(**caption)
        inputs = [self.dot_product_in(dot_product)[:, None], self.component_in(codes[:, :-1])]
        x = torch.cat(inputs, dim=1) + self.positions[:, -self.components :]  # (B, K, W)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        _, x = self.run([tokens, Tokens(x, extend_mask(visible, causal))], [None, slice(None)])
        return self.out(self.norm_out(x))

    def decoder(self, prefix: Prefix, copies: int = 1) -> Callable[[Tensor], Tensor]:
        """Return `next_logits(codes)`, which runs one token and predicts the next component.

        Call it with the codes of the dot product, then with those of each component. The logits are
        `B·copies buckets`; a caption's copies are consecutive rows.
        """
        cache = Cache(prefix, copies, self.components)
        first = cache.length

        def next_logits(codes: Int64[Tensor, " rows"]) -> Float[Tensor, "rows buckets"]:
            place = cache.length - first
            embedding = self.component_in if place else self.dot_product_in
            position = self.positions[:, place - self.components, None]
            x = embedding(codes)[:, None] + position  # (B·copies, 1, W)
            mask = cache.mask[:, None, None, : cache.length + 1]
            (x,) = self.run([Tokens(x, mask)], [slice(None)], cache.extend)
            cache.length += 1
            return self.out(self.norm_out(x))[:, 0]

        return next_logits


def _smooth_rows(buckets: int, width: int) -> Float[Tensor, "buckets width"]:
    """Return normally distributed rows that vary smoothly over about an eighth of the codes.

    Neighboring codes have neighboring values, so the network need not learn this first.
    """
    place = torch.linspace(0, 1, buckets)
    kernel = torch.exp(-(8 * (place[:, None] - place)).square())
    return F.normalize(kernel, dim=1) @ torch.randn(buckets, width)
