"""Match the tensors of our stages with those of Karlo's components.

A component's tensors are named as in diffusers and transformers, or as in Karlo's own checkpoints.
In the tables of names, "?" is one of q, k and v.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from unclip.interop.karlo_files import Component
from unclip.networks import UNet
from unclip.networks.unet import AttentionBlock, ResBlock
from unclip.recipes import check_names
from unclip.stages import ClipStage, DecoderStage, PriorStage, UpsamplerStage

Style = Literal["diffusers", "karlo"]
STYLES: tuple[Style, Style] = ("diffusers", "karlo")
Names = dict[str, str]  # ours: theirs
Table = dict[str, tuple[str, str]]  # ours: (diffusers', Karlo's)
Join = Callable[..., Tensor]

_PRIOR: Table = {
    "text_in": ("encoder_hidden_states_proj", "text_enc_proj"),
    "text_embedding_in": ("embedding_proj", "text_emb_proj"),
    "image_in": ("proj_in", "clip_img_proj"),
    "time.0": ("time_embedding.linear_1", "time_embed.0"),
    "time.2": ("time_embedding.linear_2", "time_embed.2"),
    "norm_out": ("norm_out", "final_ln"),
    "out": ("proj_to_clip_embeddings", "out_proj"),
    "query": ("prd_embedding", "prd_emb"),
    "positions": ("positional_embedding", "positional_embedding"),
}
_PRIOR_BLOCK: Table = {
    "norm_attention": ("norm1", "ln_1"),
    "norm_mlp": ("norm3", "ln_2"),
    "qkv": ("attn1.to_?", "attn.c_qkv"),
    "out": ("attn1.to_out.0", "attn.c_proj"),
    "mlp.0": ("ff.net.0.proj", "mlp.c_fc"),
    "mlp.2": ("ff.net.2", "mlp.c_proj"),
}
_UNET: Table = {
    "time.0": ("time_embedding.linear_1", "time_embed.0"),
    "time.2": ("time_embedding.linear_2", "time_embed.2"),
    "conv_in": ("conv_in", "input_blocks.0.0"),
    "norm_out": ("conv_norm_out", "out.0"),
    "conv_out": ("conv_out", "out.2"),
}
_RES_BLOCK: Table = {
    "norm_in": ("norm1", "in_layers.0"),
    "conv_in": ("conv1", "in_layers.2"),
    "time": ("time_emb_proj", "emb_layers.1"),
    "norm_out": ("norm2", "out_layers.0"),
    "conv_out": ("conv2", "out_layers.3"),
    "skip": ("conv_shortcut", "skip_connection"),
}
_ATTENTION: Table = {
    "norm": ("group_norm", "norm"),
    "qkv": ("to_?", "qkv"),
    "context_kv": ("add_?_proj", "encoder_kv"),
    "out": ("to_out.0", "proj_out"),
}
_PROJECTIONS: Table = {
    "network.conditioning.text_to_context": ("encoder_hidden_states_proj", "text_seq_proj.0"),
    "network.conditioning.text_norm": ("text_encoder_hidden_states_norm", "text_seq_proj.1"),
    "network.conditioning.text_to_time": ("embedding_proj", "text_feat_proj"),
    "network.conditioning.image_to_time": (
        "clip_image_embeddings_project_to_time_embeddings",
        "clip_emb",
    ),
    "network.conditioning.image_to_context": ("clip_extra_context_tokens_proj", "clip_tok_proj"),
    "null_image_embedding": ("learned_classifier_free_guidance_embeddings", "cf_param"),
}
# open_clip's names: transformers'.
_TEXT_TOWER: Names = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
_IMAGE_TOWER: Names = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # their spelling
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
}
_CLIP_BLOCK: Names = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.in_proj_weight": "self_attn.?_proj.weight",
    "attn.in_proj_bias": "self_attn.?_proj.bias",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class Match(NamedTuple):
    """A tensor of ours and the tensors of theirs that make it.

    Attributes:
        ours: name of our tensor.
        theirs: names of their tensors, the arguments of `join`.
        join: function from their tensors to ours.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Join


Layout = dict[str, list[Match]]


def clip_layout(stage: ClipStage) -> Layout:
    """Match both towers; transformers' encoders have no logit scale."""
    model: Any = stage.model
    layout: Layout = {}
    for component, names, tower, ours, theirs in (
        ("text_encoder", _TEXT_TOWER, model, "transformer", "text_model"),
        ("image_encoder", _IMAGE_TOWER, model.visual, "visual.transformer", "vision_model"),
    ):
        for i in range(len(tower.transformer.resblocks)):
            block = _under(f"{ours}.resblocks.{i}.", f"{theirs}.encoder.layers.{i}.", _CLIP_BLOCK)
            names = names | block
        layout[component] = _match(stage, _under("model.", "", names), "diffusers")
    return layout


def prior_layout(stage: PriorStage, style: Style) -> Layout:
    """Match the transformer and the statistics of image embeddings."""
    names = _column(_PRIOR, style)
    for i in range(len(stage.network.blocks)):
        theirs = {"diffusers": f"transformer_blocks.{i}.", "karlo": f"transformer.resblocks.{i}."}
        names |= _under(f"blocks.{i}.", theirs[style], _column(_PRIOR_BLOCK, style))
    statistics = {f"image_scaling.{name}": f"clip_{name}" for name in ("mean", "std")}
    return {"prior": _match(stage, _under("network.", "", names) | statistics, style)}


def decoder_layout(stage: DecoderStage, style: Style) -> Layout:
    """Match the U-Net, its conditioning, and the null image embedding."""
    return {
        "decoder": _match(stage, _unet_names(stage.network, "network.", style), style),
        "text_proj": _match(stage, _column(_PROJECTIONS, style), style),
    }


def upsampler_layout(stage: UpsamplerStage, style: Style) -> Layout:
    """Match the U-Net of the first steps and that of the last step."""
    assert stage.last_network is not None
    last = _unet_names(stage.last_network, "last_network.", style)
    return {
        "super_res_first": _match(stage, _unet_names(stage.network, "network.", style), style),
        "super_res_last": _match(stage, last, style),
    }


def _unet_names(network: UNet, prefix: str, style: Style) -> Names:
    """Return their names of the layers of a U-Net, without its conditioning."""
    names, blocks = _column(_UNET, style), _column(_block_names(network), style)
    for path, module in network.named_modules():
        if isinstance(module, ResBlock | AttentionBlock):
            table = _RES_BLOCK if isinstance(module, ResBlock) else _ATTENTION
            names |= _under(f"{path}.", f"{blocks[path]}.", _column(table, style))
    return _under(prefix, "", names)


def _block_names(network: UNet) -> Table:
    """Return the names of blocks; Karlo numbers residual blocks and downsamplers in a sequence."""
    last = 1 if network.middle_attention is None else 2
    names = {"middle_attention": ("mid_block.attentions.0", "middle_block.1")}
    for r in range(2):
        names[f"middle.{r}"] = f"mid_block.resnets.{r}", f"middle_block.{last * r}"
    count = len(network.up[0].blocks)  # on the way down, one of them is the downsampler
    for i, level in enumerate(network.up):
        for r in range(count):
            for side, number in (("down", 1 + count * i + r), ("up", count * i + r)):
                ours, theirs = f"{side}.{i}", f"{side}_blocks.{i}"
                karlo = f"{'input' if side == 'down' else 'output'}_blocks.{number}"
                names[f"{ours}.blocks.{r}"] = f"{theirs}.resnets.{r}", f"{karlo}.0"
                names[f"{ours}.attention.{r}"] = f"{theirs}.attentions.{r}", f"{karlo}.1"
        end = count * (i + 1)
        # the upsampler is a part of the level's last block
        upsampler = f"output_blocks.{end - 1}.{2 if level.attention else 1}"
        names[f"down.{i}.resampler"] = f"down_blocks.{i}.downsamplers.0", f"input_blocks.{end}.0"
        names[f"up.{i}.resampler"] = f"up_blocks.{i}.upsamplers.0", upsampler
    return names


def _column(table: Table, style: Style) -> Names:
    return {ours: theirs[STYLES.index(style)] for ours, theirs in table.items()}


def _under(ours: str, theirs: str, names: Names) -> Names:
    return {f"{ours}{name}": f"{theirs}{other}" for name, other in names.items()}


def _match(stage: nn.Module, names: Names, style: Style) -> list[Match]:
    """Match the tensors of a stage whose own name, or whose layer's, is in `names`."""
    matches = []
    for key in stage.state_dict():
        layer, _, leaf = key.rpartition(".")
        theirs = names.get(key, f"{names[layer]}.{leaf}" if layer in names else "")
        parts = "kv" if layer.endswith("context_kv") else "qkv"
        several = dict.fromkeys(theirs.replace("?", part) for part in parts)
        if theirs:
            matches.append(Match(key, tuple(several), _join(stage, key, style)))
    return matches


def _join(stage: nn.Module, key: str, style: Style) -> Join:
    """Return the function from their tensors to ours.

    The rows of the attention's projections are (q, k, v) in our networks, three layers in
    diffusers, and grouped by head in Karlo. The rows of the image tokens are interleaved in theirs.
    """
    if key in ("model.text_projection", "model.visual.proj"):
        return torch.t
    path, _, layer = key.rpartition(".")[0].rpartition(".")
    block: Any = stage.get_submodule(path)
    if style == "karlo" and layer in ("qkv", "context_kv"):
        rows = "(h part row) ... -> (part h row) ..."
        return partial(rearrange, pattern=rows, h=block.heads, part=3 if layer == "qkv" else 2)
    if layer == "image_to_context":
        rows = "(row part) ... -> (part row) ..."
        return partial(rearrange, pattern=rows, part=block.image_tokens)
    return _concatenate


def _concatenate(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors)


def convert_tensors(
    component: Component, matches: Sequence[Match], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Convert their tensors to ours, in float32; dimensions of size one are added or removed.

    Args:
        component: their component.
        matches: one match for each of our tensors that the component contains.
        expected: tensors of our shapes, on any device.

    Raises:
        ValueError: naming their tensor that is missing, unexpected, or of another shape.
    """
    source, theirs = component
    check_names(source, {key for match in matches for key in match.theirs}, theirs.keys())
    converted = {}
    for ours, keys, join in matches:
        tensors, shape = [theirs[key] for key in keys], expected[ours].shape
        try:
            joined = join(*tensors)
        except RuntimeError:  # the shapes do not even fit the join
            joined = None
        if joined is None or _without_ones(joined.shape) != _without_ones(shape):
            pairs = zip(keys, tensors, strict=True)
            given = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in pairs)
            raise ValueError(f"{source}: {given} does not fit unclip's {ours} {list(shape)}")
        converted[ours] = joined.reshape(shape).float()
    return converted


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]
