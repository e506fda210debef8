"""The U-Net's tensors by diffusers' names and by those of ADM, GLIDE and Karlo."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from unclip.interop.layout import (
    SAME,
    TO_ROW,
    UNCONVOLVED,
    Join,
    Match,
    affine,
    by_head,
    convolved,
    interleaved,
    stacked,
)
from unclip.networks import UNet
from unclip.networks.unet import AttentionBlock, Level, ResBlock

Style = Literal["diffusers", "karlo"]

_RES = {
    "norm_in": ("norm1", "in_layers.0"),
    "conv_in": ("conv1", "in_layers.2"),
    "time": ("time_emb_proj", "emb_layers.1"),
    "norm_out": ("norm2", "out_layers.0"),
    "conv_out": ("conv2", "out_layers.3"),
    "skip": ("conv_shortcut", "skip_connection"),
}
_ENDS = {
    "time.0": ("time_embedding.linear_1", "time_embed.0"),
    "time.2": ("time_embedding.linear_2", "time_embed.2"),
    "conv_in": ("conv_in", "input_blocks.0.0"),
    "norm_out": ("conv_norm_out", "out.0"),
    "conv_out": ("conv_out", "out.2"),
}


class _Place(NamedTuple):
    """A block of the network and where either style keeps it."""

    block: ResBlock | AttentionBlock
    ours: str
    diffusers: str
    karlo: str


def unet_matches(network: UNet, style: Style) -> list[Match]:
    """All of a U-Net but its conditioning, which `conditioning_matches` has.

    Attention rows are (q, k, v) in ours, three layers in diffusers, and grouped by head in Karlo.
    """
    column = ("diffusers", "karlo").index(style)
    matches = [m for ours, theirs in _ENDS.items() for m in affine(ours, theirs[column])]
    for place in _places(network):
        theirs = place.diffusers if style == "diffusers" else place.karlo
        if isinstance(place.block, ResBlock):
            for leaf, names in _RES.items():
                if any(True for _ in getattr(place.block, leaf).parameters()):
                    matches += affine(f"{place.ours}.{leaf}", f"{theirs}.{names[column]}")
        elif style == "diffusers":
            matches += _diffusers_attention(place.block, place.ours, theirs)
        else:
            matches += _karlo_attention(place.block, place.ours, theirs)
    return matches


def conditioning_matches(network: UNet, style: Style) -> list[Match]:
    """A U-Net's conditioning; their rows alternate between the tokens that an embedding makes."""
    names = {
        "text_to_context": ("encoder_hidden_states_proj", "text_seq_proj.0"),
        "text_norm": ("text_encoder_hidden_states_norm", "text_seq_proj.1"),
        "image_to_context": ("clip_extra_context_tokens_proj", "clip_tok_proj"),
        "text_to_time": ("embedding_proj", "text_feat_proj"),
        "image_to_time": ("clip_image_embeddings_project_to_time_embeddings", "clip_emb"),
    }
    column = ("diffusers", "karlo").index(style)
    matches = []
    for leaf, theirs in names.items():
        tokens = interleaved(network.conditioning.image_tokens)
        join = tokens if leaf == "image_to_context" else SAME
        matches += affine(f"conditioning.{leaf}", theirs[column], join=join)
    return matches


def null_image_match(ours: str, style: Style) -> Match:
    """The learned embedding that stands for no image."""
    theirs = {
        "diffusers": "learned_classifier_free_guidance_embeddings",
        "karlo": "cf_param",
    }
    return Match(ours, (theirs[style],), TO_ROW)


def _diffusers_attention(block: AttentionBlock, ours: str, theirs: str) -> list[Match]:
    matches = affine(f"{ours}.norm", f"{theirs}.group_norm")
    qkv = [f"{theirs}.to_{part}" for part in "qkv"]
    matches += affine(f"{ours}.qkv", *qkv, join=stacked(3))
    if block.context_kv is not None:
        pair = [f"{theirs}.add_{part}_proj" for part in "kv"]
        matches += affine(f"{ours}.context_kv", *pair, join=stacked(2))
    return matches + affine(f"{ours}.out", f"{theirs}.to_out.0")


def _karlo_attention(block: AttentionBlock, ours: str, theirs: str) -> list[Match]:
    matches = affine(f"{ours}.norm", f"{theirs}.norm")
    matches += _pointwise(f"{ours}.qkv", f"{theirs}.qkv", by_head(block.heads, 3))
    if block.context_kv is not None:
        context = by_head(block.heads, 2)
        matches += _pointwise(f"{ours}.context_kv", f"{theirs}.encoder_kv", context)
    weight, bias = affine(f"{ours}.out", f"{theirs}.proj_out")
    return [*matches, weight._replace(join=UNCONVOLVED), bias]


def _pointwise(ours: str, theirs: str, join: Join) -> list[Match]:
    """A convolution over one position, grouped by head."""
    weight, bias = affine(ours, theirs, join=join)
    return [weight._replace(join=convolved(join)), bias]


def _places(network: UNet) -> Iterator[_Place]:
    """Every block. Karlo counts residual blocks and downsamplers through."""
    at = 1
    for i, level in enumerate(network.down):
        for r in range(len(level.blocks)):
            yield from _step(level, r, f"down.{i}", f"down_blocks.{i}", f"input_blocks.{at}")
            at += 1
        if level.resampler is not None:
            theirs = f"down_blocks.{i}.downsamplers.0"
            yield _Place(level.resampler, f"down.{i}.resampler", theirs, f"input_blocks.{at}.0")
            at += 1

    yield _Place(network.middle[0], "middle.0", "mid_block.resnets.0", "middle_block.0")
    at = 1
    if network.middle_attention is not None:
        theirs = "mid_block.attentions.0"
        yield _Place(network.middle_attention, "middle_attention", theirs, "middle_block.1")
        at = 2
    yield _Place(network.middle[1], "middle.1", "mid_block.resnets.1", f"middle_block.{at}")

    at = 0
    for i, level in enumerate(network.up):
        for r in range(len(level.blocks)):
            yield from _step(level, r, f"up.{i}", f"up_blocks.{i}", f"output_blocks.{at}")
            at += 1
        if level.resampler is not None:  # it stands behind the level's last block
            karlo = f"output_blocks.{at - 1}.{2 if level.attention else 1}"
            theirs = f"up_blocks.{i}.upsamplers.0"
            yield _Place(level.resampler, f"up.{i}.resampler", theirs, karlo)


def _step(level: Level, r: int, ours: str, diffusers: str, karlo: str) -> Iterator[_Place]:
    """A residual block and its attention."""
    block = level.blocks[r]
    yield _Place(block, f"{ours}.blocks.{r}", f"{diffusers}.resnets.{r}", f"{karlo}.0")
    if level.attention:
        theirs = f"{diffusers}.attentions.{r}"
        yield _Place(level.attention[r], f"{ours}.attention.{r}", theirs, f"{karlo}.1")
