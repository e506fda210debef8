"""open_clip's CLIP by the names of transformers' two encoders."""

from unclip.interop.layout import SAME, TRANSPOSED, Match, affine, stacked

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def text_matches(layers: int) -> list[Match]:
    """The text tower: CLIPTextModelWithProjection."""
    here = "text_model.embeddings"
    return [
        Match("token_embedding.weight", (f"{here}.token_embedding.weight",), SAME),
        Match("positional_embedding", (f"{here}.position_embedding.weight",), SAME),
        *_blocks("transformer", "text_model.encoder", layers),
        *affine("ln_final", "text_model.final_layer_norm"),
        Match("text_projection", ("text_projection.weight",), TRANSPOSED),
    ]


def vision_matches(layers: int) -> list[Match]:
    """The image tower, a ViT: CLIPVisionModelWithProjection."""
    here = "vision_model.embeddings"
    return [
        Match("visual.class_embedding", (f"{here}.class_embedding",), SAME),
        Match("visual.conv1.weight", (f"{here}.patch_embedding.weight",), SAME),
        Match("visual.positional_embedding", (f"{here}.position_embedding.weight",), SAME),
        *affine("visual.ln_pre", "vision_model.pre_layrnorm"),  # their spelling
        *_blocks("visual.transformer", "vision_model.encoder", layers),
        *affine("visual.ln_post", "vision_model.post_layernorm"),
        Match("visual.proj", ("visual_projection.weight",), TRANSPOSED),
    ]


def _blocks(ours: str, theirs: str, layers: int) -> list[Match]:
    matches = []
    for i in range(layers):
        own, other = f"{ours}.resblocks.{i}", f"{theirs}.layers.{i}"
        for leaf, name in _BLOCK.items():
            matches += affine(f"{own}.{leaf}", f"{other}.{name}")
        for leaf in ("weight", "bias"):
            parts = tuple(f"{other}.self_attn.{part}_proj.{leaf}" for part in "qkv")
            matches.append(Match(f"{own}.attn.in_proj_{leaf}", parts, stacked(3)))
    return matches
