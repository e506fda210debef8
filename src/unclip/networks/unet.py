"""The ADM U-Net of the decoder and the upsamplers, with joint [context; image] attention.

Layout and initialization follow ADM (Dhariwal & Nichol 2021) and GLIDE (Nichol et al. 2021). The
image embedding enters in two ways (unCLIP paper, section 2.1). The network is independent of
diffusion.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unclip.networks.feature_maps import FeatureMaps
from unclip.networks.layers import (
    GroupNorm,
    ModuleList,
    TimestepMLP,
    attend,
    split_heads,
    zero_,
)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding between them, optionally up- or downsampling.

    Args:
        channels: number of input channels.
        out_channels: number of output channels.
        embedding_width: width of the time embedding.
        groups: number of groups of the norms.
        dropout: dropout probability before the second convolution.
        scale_shift: modulate the second norm (AdaGN) instead of adding the embedding.
        resample: "up" doubles height and width, "down" halves them, None keeps them.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_width: int,
        *,
        groups: int,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.scale_shift = scale_shift
        self.norm_in = GroupNorm(groups, channels)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_width, out_channels * (2 if scale_shift else 1))
        self.norm_out = GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, embedding: Float[Tensor, "batch width"]) -> Tensor:
        """Map `B C H W` to `B C' H' W'`."""
        h = self.conv_in(self._resample(F.silu(self.norm_in(x))))
        time = self.time(F.silu(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + time)
        return self.skip(self._resample(x)) + self.conv_out(self.dropout(F.silu(h)))


class Context(NamedTuple):
    """Keys and values of the context in one attention block.

    Attributes:
        keys: keys, `B heads L d`.
        values: values, `B heads L d`.
        mask: true at visible tokens, `B L`; None if all are visible.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None


class AttentionBlock(nn.Module):
    """Image positions attend to [context; image] under one softmax (GLIDE)."""

    def __init__(self, channels: int, *, head_width: int, context_width: int | None, groups: int):
        super().__init__()
        if channels % head_width:
            raise ValueError(
                f"head_width is {head_width}; it must divide the {channels} channels of a level "
                "with attention"
            )
        self.heads = channels // head_width
        self.norm = GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = None if context_width is None else nn.Linear(context_width, 2 * channels)
        self.out = zero_(nn.Linear(channels, channels))

    def encode_context(
        self,
        tokens: Float[Tensor, "batch length context_width"],
        mask: Bool[Tensor, "batch length"] | None,
    ) -> Context:
        """Return the context's keys and values, which are the same at every sampling step."""
        assert self.context_kv is not None, "the network has no conditioning"
        keys, values = self.context_kv(tokens).chunk(2, dim=2)
        return Context(split_heads(keys, self.heads), split_heads(values, self.heads), mask)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], context: Context | None
    ) -> Float[Tensor, "batch channels height width"]:
        """Attend to `context`, a result of `encode_context` (None: no context), and the image."""
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(tokens).chunk(3, dim=2))
        mask = None
        if context is not None:
            k = torch.cat([context.keys, k], dim=2)
            v = torch.cat([context.values, v], dim=2)
            if context.mask is not None:
                mask = F.pad(context.mask, (0, tokens.shape[1]), value=True)[:, None, None]
        out = self.out(attend(q, k, v, mask))
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if the level has it."""

    def __init__(
        self, blocks: list[ResBlock], attention: list[AttentionBlock], resampler: ResBlock | None
    ):
        super().__init__()
        self.blocks = ModuleList[ResBlock](blocks)
        self.attention = ModuleList[AttentionBlock](attention)
        self.resampler = resampler


class Conditioning(nn.Module):
    """Turn image embedding and caption into context tokens and a part of the time embedding.

    The image embedding is projected to `image_tokens` context tokens before those of the text, and
    also added to the time embedding (section 2.1), as is the text embedding (GLIDE).

    Args:
        image_embedding: D, width of the embeddings.
        text_states: width of the text states.
        context_width: width of the context tokens.
        embedding_width: width of the time embedding.
        image_tokens: number of context tokens of an image embedding.
    """

    def __init__(
        self,
        image_embedding: int,
        text_states: int,
        context_width: int,
        embedding_width: int,
        image_tokens: int = 4,
    ):
        super().__init__()
        self.image_tokens = image_tokens
        self.image_to_time = nn.Linear(image_embedding, embedding_width)
        self.text_to_time = nn.Linear(image_embedding, embedding_width)
        self.image_to_context = nn.Linear(image_embedding, image_tokens * context_width)
        self.text_to_context = nn.Linear(text_states, context_width)
        self.text_norm = nn.LayerNorm(context_width)

    def forward(
        self,
        image_embedding: Float[Tensor, "batch dim"],
        text_embedding: Float[Tensor, "batch dim"],
        text_states: Float[Tensor, "batch length width"],
        text_mask: Bool[Tensor, "batch length"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the addition to the time embedding, the context tokens and their mask."""
        time = self.image_to_time(image_embedding) + self.text_to_time(text_embedding)
        image_tokens = self.image_to_context(image_embedding).unflatten(1, (self.image_tokens, -1))
        text_tokens = self.text_norm(self.text_to_context(text_states))
        context = torch.cat([image_tokens, text_tokens], dim=1)
        return time, context, F.pad(text_mask, (self.image_tokens, 0), value=True)


class UNet(nn.Module):
    """ADM U-Net.

    Args:
        channels: number of channels of the first level.
        multipliers: factor on `channels` of each level; each level halves the resolution.
        blocks: number of residual blocks per level (one more on the way up).
        attention_levels: levels, from 0, with attention; if there are any, the middle has it too.
        head_width: number of channels of an attention head.
        conditioning: arguments of `Conditioning`; None for a network that takes only images.
        feature_maps: `levels`, `hidden`, `rank` and `image_size` of the `FeatureMaps` that are
            added to the input of their levels on the way down, which needs `conditioning`; None for
            a network that takes any image size.
        in_channels: number of input channels: 3, or 6 with a concatenated low-resolution image.
        out_channels: number of output channels: 3, or 6 with a learned variance.
        patch: side of the pixel-unshuffle front end; 1 is the paper's network. With a larger patch
            the network can only predict x0, since it cannot pass the noise through.
        scale_shift: use AdaGN in the residual blocks.
        dropout: dropout probability in the residual blocks.
        groups: number of groups of the norms.

    Height and width of the input must be multiples of `patch · 2^(levels - 1)`.

    Raises:
        ValueError: `head_width` does not divide the channels of a level with attention, or
            `feature_maps` comes without `conditioning` or does not fit the levels.
    """

    def __init__(
        self,
        *,
        channels: int,
        multipliers: Sequence[int],
        blocks: int,
        attention_levels: Sequence[int] = (),
        head_width: int = 64,
        conditioning: dict[str, int] | None = None,
        feature_maps: dict[str, Any] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        patch: int = 1,
        scale_shift: bool = True,
        dropout: float = 0.0,
        groups: int = 32,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.patch = in_channels, out_channels, patch
        self.stride = patch * 2 ** (len(multipliers) - 1)
        self.widths = widths = [channels * multiplier for multiplier in multipliers]
        embedding_width = 4 * channels
        context_width = None if conditioning is None else conditioning["context_width"]

        def block(width: int, out_width: int, resample: str | None = None) -> ResBlock:
            return ResBlock(
                width,
                out_width,
                embedding_width,
                groups=groups,
                dropout=dropout,
                scale_shift=scale_shift,
                resample=resample,
            )

        def attention(width: int) -> AttentionBlock:
            return AttentionBlock(
                width, head_width=head_width, context_width=context_width, groups=groups
            )

        self.time = TimestepMLP(channels, embedding_width)
        self.conditioning = self.feature_maps = None
        if conditioning is not None:
            self.conditioning = Conditioning(embedding_width=embedding_width, **conditioning)
        if feature_maps is not None:
            if conditioning is None:
                raise ValueError("feature_maps are computed from embeddings: set conditioning, too")
            dim, starts = conditioning["image_embedding"], [channels, *widths[:-1]]
            self.feature_maps = FeatureMaps(dim, channels=starts, patch=patch, **feature_maps)
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)

        down, skips, width = [], [channels], channels
        for i, out_width in enumerate(widths):
            level = [block(w, out_width) for w in [width, *[out_width] * (blocks - 1)]]
            width = out_width
            attentions = [attention(width) for _ in level] if i in attention_levels else []
            resampler = block(width, width, "down") if i + 1 < len(widths) else None
            down.append(Level(level, attentions, resampler))
            skips += [width] * (blocks if resampler is None else blocks + 1)
        self.down = ModuleList[Level](down)

        self.middle = ModuleList[ResBlock]([block(width, width), block(width, width)])
        self.middle_attention = attention(width) if attention_levels else None

        up = []
        for i, out_width in reversed(list(enumerate(widths))):
            level = []
            for _ in range(blocks + 1):
                level.append(block(width + skips.pop(), out_width))
                width = out_width
            attentions = [attention(width) for _ in level] if i in attention_levels else []
            up.append(Level(level, attentions, block(width, width, "up") if i > 0 else None))
        self.up = ModuleList[Level](up)

        self.norm_out = GroupNorm(groups, width)
        self.conv_out = zero_(nn.Conv2d(width, out_channels * patch**2, 3, padding=1))

    def bind(
        self,
        *,
        concat: Float[Tensor, "batch concat_channels height width"] | None = None,
        **condition: Tensor,
    ) -> Callable[..., Any]:
        """Return `network(x_t, t)`, and compute everything that depends on neither only once.

        This includes the conditioning, the context's keys and values in every attention block, the
        feature maps, and the first convolution of the concatenated channels.

        Args:
            concat: the last channels of the input, such as a low-resolution image.
            condition: arguments of `Conditioning`; none for a network without it.
        """
        addition, contexts, maps, dtype = None, {}, {}, self.conv_in.weight.dtype
        if self.conditioning is not None:
            condition = {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in condition.items()
            }
            addition, tokens, mask = self.conditioning(**condition)
            contexts = {
                block: block.encode_context(tokens, mask) for block in self._attention_blocks()
            }
        if self.feature_maps is not None:
            maps = self.feature_maps(condition["image_embedding"], condition["text_embedding"])
        first = self.conv_in
        if concat is not None:
            concat = self._converted(concat)
            channels = (self.in_channels - concat.shape[1]) * self.patch**2
            first = _SplitConvolution(self.conv_in, channels, F.pixel_unshuffle(concat, self.patch))
        return partial(self._run, first, addition, contexts, maps)

    def forward(
        self,
        x_t: Float[Tensor, "batch channels height width"],
        t: Float[Tensor, " batch"],
        *,
        concat: Float[Tensor, "batch concat_channels height width"] | None = None,
        features_of: int | None = None,
        **condition: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the output, `batch out_channels height width`, and features if they are asked for.

        Args:
            x_t: noisy images.
            t: timesteps.
            concat: as in `bind`.
            features_of: a level whose features on the way up are returned, too.
            condition: as in `bind`.

        Raises:
            ValueError: height or width do not fit the network's stride or its feature maps.
        """
        if concat is not None:
            x_t = torch.cat([x_t, concat], dim=1)
        return self.bind(**condition)(x_t, t, features_of=features_of)

    def _converted(self, image: Tensor) -> Tensor:
        """Convert to the weights' dtype and, on CUDA, to the memory format of its convolutions."""
        memory_format = torch.channels_last if image.is_cuda else torch.preserve_format
        return image.to(self.conv_in.weight.dtype, memory_format=memory_format)

    def _attention_blocks(self) -> Iterator[AttentionBlock]:
        return (module for module in self.modules() if isinstance(module, AttentionBlock))

    def _run(
        self,
        first: Callable[[Tensor], Tensor],
        addition: Tensor | None,
        contexts: dict[AttentionBlock, Context],
        maps: dict[int, Tensor],
        x_t: Tensor,
        t: Tensor,
        features_of: int | None = None,
    ) -> Any:
        if x_t.shape[2] % self.stride or x_t.shape[3] % self.stride:
            raise ValueError(
                f"an image of {x_t.shape[2]}×{x_t.shape[3]} does not fit this U-Net: "
                f"its sides must be multiples of {self.stride}"
            )
        if self.feature_maps is not None and {*x_t.shape[2:]} != {self.feature_maps.image_size}:
            size = self.feature_maps.image_size
            raise ValueError(
                f"an image of {x_t.shape[2]}×{x_t.shape[3]} does not fit this U-Net: its feature "
                f"maps are for {size}×{size}; without feature_maps it takes any size"
            )
        x_t = self._converted(x_t)
        embedding = self.time(t) if addition is None else self.time(t) + addition

        def run_block(level: Level, i: int, h: Tensor) -> Tensor:
            h = level.blocks[i](h, embedding)
            if level.attention:
                h = level.attention[i](h, contexts.get(level.attention[i]))
            return h

        h = first(F.pixel_unshuffle(x_t, self.patch))
        skips = [h]
        for depth, level in enumerate(self.down):
            if depth in maps:
                h = h + maps[depth]
            for i in range(len(level.blocks)):
                h = run_block(level, i, h)
                skips.append(h)
            if level.resampler is not None:
                h = level.resampler(h, embedding)
                skips.append(h)
        h = self.middle[0](h, embedding)
        if self.middle_attention is not None:
            h = self.middle_attention(h, contexts.get(self.middle_attention))
        h = self.middle[1](h, embedding)
        features = None
        for depth, level in zip(reversed(range(len(self.up))), self.up, strict=True):
            for i in range(len(level.blocks)):
                h = run_block(level, i, torch.cat([h, skips.pop()], dim=1))
            if depth == features_of:
                features = h
            if level.resampler is not None:
                h = level.resampler(h, embedding)
        out = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)
        return out if features is None else (out, features)


class _SplitConvolution:
    """A convolution of [x; concat] whose part for `concat` is computed once."""

    def __init__(self, convolution: nn.Conv2d, channels: int, concat: Tensor):
        weight = convolution.weight
        self.weight, self.padding = weight[:, :channels].contiguous(), convolution.padding
        rest = weight[:, channels:].contiguous()
        self.part = F.conv2d(concat, rest, convolution.bias, padding=self.padding)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=self.padding) + self.part
