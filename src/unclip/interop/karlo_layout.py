"""Match the tensors of our stages with those of the pipeline's components.

A component's tensors are named as in diffusers and transformers, or as in Karlo's checkpoints.
"""

from functools import partial

from unclip.interop.unet_layout import conditioning_matches, unet_matches
from unclip.interop.weight_mapping import (
    Match,
    Style,
    affine,
    as_row,
    by_head,
    first_row,
    stack,
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
    model = stage.model
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
    statistics = [
        Match("image_scaling.mean", ("clip_mean",), first_row),
        Match("image_scaling.std", ("clip_std",), first_row),
    ]
    return {"prior": under("network", _prior_matches(stage.network, style)) + statistics}


def decoder_layout(stage: DecoderStage, style: Style) -> Layout:
    """Match the U-Net, its conditioning, and the null image embedding."""
    null = "cf_param" if style == "karlo" else "learned_classifier_free_guidance_embeddings"
    projections = under("network", conditioning_matches(stage.network, style))
    return {
        "decoder": under("network", unet_matches(stage.network, style)),
        "text_proj": [*projections, Match("null_image_embedding", (null,), as_row)],
    }


def upsampler_layout(stage: UpsamplerStage, style: Style) -> Layout:
    """Match the U-Net of the first steps and that of the last step."""
    return {
        "super_res_first": under("network", unet_matches(stage.network, style)),
        "super_res_last": under("last_network", unet_matches(stage.last_network, style)),
    }


def _clip_blocks(ours: str, theirs: str, layers: int) -> list[Match]:
    matches = []
    for i in range(layers):
        our_block, their_block = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
        for leaf, name in _CLIP_BLOCK.items():
            matches += affine(f"{our_block}.{leaf}", f"{their_block}.{name}")
        for leaf in ("weight", "bias"):
            parts = tuple(f"{their_block}.self_attn.{part}_proj.{leaf}" for part in "qkv")
            matches.append(Match(f"{our_block}.attn.in_proj_{leaf}", parts, stack))
    return matches


def _prior_matches(network: PriorTransformer, style: Style) -> list[Match]:
    """Match all tensors of the prior; only Karlo groups the attention's rows by head."""
    column = ("diffusers", "karlo").index(style)
    matches = [m for ours, theirs in _PRIOR.items() for m in affine(ours, theirs[column])]
    matches += [Match(ours, (theirs[column],)) for ours, theirs in _PRIOR_TENSORS.items()]
    for i, block in enumerate(network.blocks):
        ours = f"blocks.{i}"
        theirs = (f"transformer_blocks.{i}", f"transformer.resblocks.{i}")[column]
        for leaf, names in _PRIOR_BLOCK.items():
            matches += affine(f"{ours}.{leaf}", f"{theirs}.{names[column]}")
        if style == "diffusers":
            qkv = [f"{theirs}.attn1.to_{part}" for part in "qkv"]
            matches += affine(f"{ours}.qkv", *qkv, join=stack)
        else:
            grouped = partial(by_head, heads=block.heads, count=3)
            matches += affine(f"{ours}.qkv", f"{theirs}.attn.c_qkv", join=grouped)
    return matches
