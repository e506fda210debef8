"""Match the tensors of our stages with those of the pipeline's components.

A component's tensors are named as in diffusers and transformers, or as in Karlo's checkpoints.
"""

from typing import Any, cast

from unclip.interop.unet_layout import conditioning_matches, unet_matches
from unclip.interop.weight_mapping import (
    STYLES,
    Match,
    Style,
    affine,
    layers,
    projections,
    transpose,
    under,
)
from unclip.networks import PriorTransformer
from unclip.stages import ClipStage, DecoderStage, PriorStage, UpsamplerStage

Layout = dict[str, list[Match]]

# Ours: (diffusers', Karlo's).
_PRIOR = {
    "text_in": ("encoder_hidden_states_proj", "text_enc_proj"),
    "text_embedding_in": ("embedding_proj", "text_emb_proj"),
    "image_in": ("proj_in", "clip_img_proj"),
    "time.0": ("time_embedding.linear_1", "time_embed.0"),
    "time.2": ("time_embedding.linear_2", "time_embed.2"),
    "norm_out": ("norm_out", "final_ln"),
    "out": ("proj_to_clip_embeddings", "out_proj"),
}
_PRIOR_TENSORS = {
    "query": ("prd_embedding", "prd_emb"),
    "positions": ("positional_embedding", "positional_embedding"),
}
_PRIOR_BLOCK = {
    "norm_attention": ("norm1", "ln_1"),
    "norm_mlp": ("norm3", "ln_2"),
    "out": ("attn1.to_out.0", "attn.c_proj"),
    "mlp.0": ("ff.net.0.proj", "mlp.c_fc"),
    "mlp.2": ("ff.net.2", "mlp.c_proj"),
}
# open_clip's (ours): transformers'.
_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_layout(stage: ClipStage) -> Layout:
    """Match both towers; transformers' encoders have no logit scale."""
    model = cast(Any, stage.model)
    text, vision = "text_model.embeddings", "vision_model.embeddings"
    text_matches = [
        Match("token_embedding.weight", (f"{text}.token_embedding.weight",)),
        Match("positional_embedding", (f"{text}.position_embedding.weight",)),
        *_clip_blocks("transformer", "text_model", len(model.transformer.resblocks)),
        *affine("ln_final", "text_model.final_layer_norm"),
        Match("text_projection", ("text_projection.weight",), transpose),
    ]
    vision_matches = [
        Match("visual.class_embedding", (f"{vision}.class_embedding",)),
        Match("visual.conv1.weight", (f"{vision}.patch_embedding.weight",)),
        Match("visual.positional_embedding", (f"{vision}.position_embedding.weight",)),
        *affine("visual.ln_pre", "vision_model.pre_layrnorm"),  # their spelling
        *_clip_blocks(
            "visual.transformer", "vision_model", len(model.visual.transformer.resblocks)
        ),
        *affine("visual.ln_post", "vision_model.post_layernorm"),
        Match("visual.proj", ("visual_projection.weight",), transpose),
    ]
    return {
        "text_encoder": under("model", text_matches),
        "image_encoder": under("model", vision_matches),
    }


def prior_layout(stage: PriorStage, style: Style) -> Layout:
    """Match the transformer and the statistics of image embeddings."""
    statistics = [Match(f"image_scaling.{name}", (f"clip_{name}",)) for name in ("mean", "std")]
    return {"prior": under("network", _prior_matches(stage.network, style)) + statistics}


def decoder_layout(stage: DecoderStage, style: Style) -> Layout:
    """Match the U-Net, its conditioning, and the null image embedding."""
    null = "cf_param" if style == "karlo" else "learned_classifier_free_guidance_embeddings"
    projections = under("network", conditioning_matches(stage.network, style))
    return {
        "decoder": under("network", unet_matches(stage.network, style)),
        "text_proj": [*projections, Match("null_image_embedding", (null,))],
    }


def upsampler_layout(stage: UpsamplerStage, style: Style) -> Layout:
    """Match the U-Net of the first steps and that of the last step."""
    assert stage.last_network is not None
    return {
        "super_res_first": under("network", unet_matches(stage.network, style)),
        "super_res_last": under("last_network", unet_matches(stage.last_network, style)),
    }


def _clip_blocks(ours: str, theirs: str, count: int) -> list[Match]:
    matches = []
    for i in range(count):
        our_block, their_block = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
        for leaf, name in _CLIP_BLOCK.items():
            matches += affine(f"{our_block}.{leaf}", f"{their_block}.{name}")
        for leaf in ("weight", "bias"):
            parts = tuple(f"{their_block}.self_attn.{part}_proj.{leaf}" for part in "qkv")
            matches.append(Match(f"{our_block}.attn.in_proj_{leaf}", parts))
    return matches


def _prior_matches(network: PriorTransformer, style: Style) -> list[Match]:
    """Match all tensors of the prior's network."""
    column = STYLES.index(style)
    matches = layers(_PRIOR, style)
    matches += [Match(ours, (theirs[column],)) for ours, theirs in _PRIOR_TENSORS.items()]
    for i, block in enumerate(network.blocks):
        ours = f"blocks.{i}"
        theirs = (f"transformer_blocks.{i}", f"transformer.resblocks.{i}")[column]
        matches += layers(_PRIOR_BLOCK, style, f"{ours}.", f"{theirs}.")
        separate, joint = [f"{theirs}.attn1.to_{part}" for part in "qkv"], f"{theirs}.attn.c_qkv"
        matches += projections(f"{ours}.qkv", separate, joint, style, block.heads)
    return matches
