"""Match a U-Net's tensors with diffusers' names, and with those of ADM, GLIDE and Karlo."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from torch import nn

from unclip.interop.weight_mapping import Match, Style, interleaved, layers, projections
from unclip.networks import UNet
from unclip.networks.unet import AttentionBlock, Level, ResBlock

# Ours: (diffusers', Karlo's).
_RES_BLOCK = {
    "norm_in": ("norm1", "in_layers.0"),
    "conv_in": ("conv1", "in_layers.2"),
    "time": ("time_emb_proj", "emb_layers.1"),
    "norm_out": ("norm2", "out_layers.0"),
    "conv_out": ("conv2", "out_layers.3"),
}
_SKIP = {"skip": ("conv_shortcut", "skip_connection")}  # only if the block changes the channels
_ATTENTION = {"norm": ("group_norm", "norm"), "out": ("to_out.0", "proj_out")}
_ENDS = {
    "time.0": ("time_embedding.linear_1", "time_embed.0"),
    "time.2": ("time_embedding.linear_2", "time_embed.2"),
    "conv_in": ("conv_in", "input_blocks.0.0"),
    "norm_out": ("conv_norm_out", "out.0"),
    "conv_out": ("conv_out", "out.2"),
}
_CONDITIONING = {
    "text_to_context": ("encoder_hidden_states_proj", "text_seq_proj.0"),
    "text_norm": ("text_encoder_hidden_states_norm", "text_seq_proj.1"),
    "text_to_time": ("embedding_proj", "text_feat_proj"),
    "image_to_time": ("clip_image_embeddings_project_to_time_embeddings", "clip_emb"),
}
_IMAGE_TO_CONTEXT = {"image_to_context": ("clip_extra_context_tokens_proj", "clip_tok_proj")}


class _Block(NamedTuple):
    """A block of a U-Net and its three names."""

    module: ResBlock | AttentionBlock
    ours: str
    diffusers: str
    karlo: str


def unet_matches(network: UNet, style: Style) -> list[Match]:
    """Match all tensors of a U-Net except its conditioning.

    The rows of the attention's projections are (q, k, v) in our networks, three layers in
    diffusers, and grouped by head in Karlo.
    """
    matches = layers(_ENDS, style)
    for block in _blocks(network):
        theirs = block.diffusers if style == "diffusers" else block.karlo
        if isinstance(block.module, ResBlock):
            has_skip = isinstance(block.module.skip, nn.Conv2d)
            names = _RES_BLOCK | (_SKIP if has_skip else {})
            matches += layers(names, style, f"{block.ours}.", f"{theirs}.")
        else:
            matches += _attention_matches(block.module, block.ours, theirs, style)
    return matches


def conditioning_matches(network: UNet, style: Style) -> list[Match]:
    """Match a U-Net's conditioning; in theirs, the rows of the image tokens are interleaved."""
    assert network.conditioning is not None
    tokens = partial(interleaved, count=network.conditioning.image_tokens)
    image = layers(_IMAGE_TO_CONTEXT, style, "conditioning.")
    return [
        *layers(_CONDITIONING, style, "conditioning."),
        *(match._replace(join=tokens) for match in image),
    ]


def _attention_matches(block: AttentionBlock, ours: str, theirs: str, style: Style) -> list[Match]:
    matches = layers(_ATTENTION, style, f"{ours}.", f"{theirs}.")
    separate = [f"{theirs}.to_{part}" for part in "qkv"]
    matches += projections(f"{ours}.qkv", separate, f"{theirs}.qkv", style, block.heads)
    if block.context_kv is not None:
        separate = [f"{theirs}.add_{part}_proj" for part in "kv"]
        joint = f"{theirs}.encoder_kv"
        matches += projections(f"{ours}.context_kv", separate, joint, style, block.heads)
    return matches


def _blocks(network: UNet) -> Iterator[_Block]:
    """Yield every block. Karlo numbers the residual blocks and the downsamplers in one sequence."""
    number = 1
    for i, level in enumerate(network.down):
        for r in range(len(level.blocks)):
            yield from _step(level, r, f"down.{i}", f"down_blocks.{i}", f"input_blocks.{number}")
            number += 1
        if level.resampler is not None:
            diffusers, karlo = f"down_blocks.{i}.downsamplers.0", f"input_blocks.{number}.0"
            yield _Block(level.resampler, f"down.{i}.resampler", diffusers, karlo)
            number += 1

    yield _Block(network.middle[0], "middle.0", "mid_block.resnets.0", "middle_block.0")
    number = 1
    if network.middle_attention is not None:
        diffusers = "mid_block.attentions.0"
        yield _Block(network.middle_attention, "middle_attention", diffusers, "middle_block.1")
        number = 2
    yield _Block(network.middle[1], "middle.1", "mid_block.resnets.1", f"middle_block.{number}")

    number = 0
    for i, level in enumerate(network.up):
        for r in range(len(level.blocks)):
            yield from _step(level, r, f"up.{i}", f"up_blocks.{i}", f"output_blocks.{number}")
            number += 1
        if level.resampler is not None:  # part of Karlo's last block of the level
            karlo = f"output_blocks.{number - 1}.{2 if level.attention else 1}"
            diffusers = f"up_blocks.{i}.upsamplers.0"
            yield _Block(level.resampler, f"up.{i}.resampler", diffusers, karlo)


def _step(level: Level, r: int, ours: str, diffusers: str, karlo: str) -> Iterator[_Block]:
    """Yield a residual block and its attention."""
    yield _Block(level.blocks[r], f"{ours}.blocks.{r}", f"{diffusers}.resnets.{r}", f"{karlo}.0")
    if level.attention:
        theirs = f"{diffusers}.attentions.{r}"
        yield _Block(level.attention[r], f"{ours}.attention.{r}", theirs, f"{karlo}.1")
