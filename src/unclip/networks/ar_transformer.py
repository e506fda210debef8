"""The autoregressive prior's causal transformer over [text, z_t, dot product, components].

Section 2.2: an image embedding is written as the codes of its principal components, one token
each, after a prefix of the caption, its embedding z_t, and the code of the dot product z_i · z_t
that is asked for. The output at the dot product tells of the first component, the output at each
component of the next. A code is the index of a bucket.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unclip.networks.causal import AfterCaption, Block, Prefix


class Cache:
    """The keys and values of a prefix, with room for those of the tokens that are to follow.

    Args:
        prefix: of captions.
        copies: sequences that continue each caption.
        room: tokens that may follow.

    Attributes:
        length: tokens that it holds.
    """

    def __init__(self, prefix: Prefix, copies: int, room: int):
        self.length = prefix.mask.shape[1]
        self.mask = F.pad(prefix.mask, (0, room), value=True).repeat_interleave(copies, dim=0)
        self._keys = [self._roomy(keys, copies, room) for keys in prefix.keys]
        self._values = [self._roomy(values, copies, room) for values in prefix.values]

    @staticmethod
    def _roomy(prefix: Tensor, copies: int, room: int) -> Tensor:
        batch, heads, length, depth = prefix.shape
        roomy = prefix.new_empty(batch, copies, heads, length + room, depth)
        roomy[..., :length, :] = prefix[:, None]
        return roomy.flatten(0, 1)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, those of one more token written behind the others."""
        end = self.length + 1
        self._keys[layer][:, :, self.length : end] = k
        self._values[layer][:, :, self.length : end] = v
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]


class ARTransformer(AfterCaption):
    """Predicts the codes of an image embedding's components, one after another.

    Args:
        embedding_dim: D, width of image and text embeddings.
        text_width: width of the text states.
        context_length: L, tokens of a caption.
        components: principal components that stand for an image embedding (the paper: 319).
        buckets: codes that a component, and the dot product, can have (the paper: 1024).
        width: of the transformer.
        layers: its depth.
        heads: its attention heads.
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
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Linear(width, buckets)
        with torch.no_grad():
            self.dot_product_in.weight.copy_(0.02 * _neighbours_alike(buckets, width))
            self.component_in.weight.copy_(0.02 * _neighbours_alike(buckets, width))
            self.out.weight.copy_(_neighbours_alike(buckets, width) / width**0.5)

    def forward(
        self,
        prefix: Prefix,
        dot_product: Int64[Tensor, " batch"],
        codes: Int64[Tensor, "batch components"],
    ) -> Float[Tensor, "batch components buckets"]:
        """Logits of every component's code, given the codes before it, in one pass."""
        inputs = [self.dot_product_in(dot_product)[:, None], self.component_in(codes[:, :-1])]
        x = torch.cat(inputs, dim=1) + self.positions[:, -self.components :]  # (B, K, W)
        own = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        seen = prefix.mask[:, None].expand(-1, x.shape[1], -1)
        mask = torch.cat([seen, own.expand(len(x), -1, -1)], dim=2)[:, None]

        def extend(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = prefix.keys[layer], prefix.values[layer]
            return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

        return self._run(x, mask, extend)

    def decoder(self, prefix: Prefix, copies: int = 1) -> Callable[[Tensor], Tensor]:
        """`next_logits(codes)`, to be called with the dot product's codes and then a component's.

        Each call runs one token and returns the next component's logits, `B·copies buckets`; the
        rows of a caption's copies lie side by side.
        """
        cache = Cache(prefix, copies, self.components)
        first = cache.length

        def next_logits(codes: Int64[Tensor, " rows"]) -> Float[Tensor, "rows buckets"]:
            place = cache.length - first
            embedding = self.component_in if place else self.dot_product_in
            position = self.positions[:, place - self.components, None]
            x = embedding(codes)[:, None] + position  # (B·copies, 1, W)
            mask = cache.mask[:, None, None, : cache.length + 1]
            logits = self._run(x, mask, cache.extend)
            cache.length += 1
            return logits[:, 0]

        return next_logits

    def _run(self, x: Tensor, mask: Tensor, extend: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        """Logits at `x`; `extend(layer, k, v)` joins its keys and values to earlier ones."""
        for layer, block in enumerate(self.blocks):
            q, k, v = block.project(x)
            x = block(x, q, *extend(layer, k, v), mask)
        return self.out(self.norm_out(x))


def _neighbours_alike(buckets: int, width: int) -> Float[Tensor, "buckets width"]:
    """Standard normal rows, smooth from one code to the next over an eighth of them.

    Codes are in the order of what they stand for; the network need not learn that first.
    """
    place = torch.linspace(0, 1, buckets)
    kernel = torch.exp(-(8 * (place[:, None] - place)).square())
    return F.normalize(kernel, dim=1) @ torch.randn(buckets, width)
