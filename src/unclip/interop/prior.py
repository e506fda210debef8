"""The prior transformer's tensors by diffusers' names and by Karlo's."""

from unclip.interop.layout import SAME, Match, affine, by_head, stacked
from unclip.interop.unet import Style
from unclip.networks import PriorTransformer

_LAYERS = {
    "text_in": ("encoder_hidden_states_proj", "text_enc_proj"),
    "text_embedding_in": ("embedding_proj", "text_emb_proj"),
    "image_in": ("proj_in", "clip_img_proj"),
    "time.0": ("time_embedding.linear_1", "time_embed.0"),
    "time.2": ("time_embedding.linear_2", "time_embed.2"),
    "norm_out": ("norm_out", "final_ln"),
    "out": ("proj_to_clip_embeddings", "out_proj"),
}
_TENSORS = {
    "query": ("prd_embedding", "prd_emb"),
    "positions": ("positional_embedding", "positional_embedding"),
}
_BLOCK = {
    "norm_attention": ("norm1", "ln_1"),
    "norm_mlp": ("norm3", "ln_2"),
    "out": ("attn1.to_out.0", "attn.c_proj"),
    "mlp.0": ("ff.net.0.proj", "mlp.c_fc"),
    "mlp.2": ("ff.net.2", "mlp.c_proj"),
}


def transformer_matches(network: PriorTransformer, style: Style) -> list[Match]:
    """Every tensor; attention rows are grouped by head in Karlo alone."""
    column = ("diffusers", "karlo").index(style)
    matches = [m for ours, theirs in _LAYERS.items() for m in affine(ours, theirs[column])]
    matches += [Match(ours, (theirs[column],), SAME) for ours, theirs in _TENSORS.items()]
    for i, block in enumerate(network.blocks):
        ours = f"blocks.{i}"
        theirs = (f"transformer_blocks.{i}", f"transformer.resblocks.{i}")[column]
        for leaf, names in _BLOCK.items():
            matches += affine(f"{ours}.{leaf}", f"{theirs}.{names[column]}")
        if style == "diffusers":
            qkv = [f"{theirs}.attn1.to_{part}" for part in "qkv"]
            matches += affine(f"{ours}.qkv", *qkv, join=stacked(3))
        else:
            grouped = by_head(block.heads, 3)
            matches += affine(f"{ours}.qkv", f"{theirs}.attn.c_qkv", join=grouped)
    return matches
