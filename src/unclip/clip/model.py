"""Build open_clip's CLIP from plain numbers, and run its towers."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.modified_resnet import Bottleneck
from open_clip.transformer import ResidualAttentionBlock, text_global_pool
from torch import Tensor, nn

from unclip.images import to_float

BLOCKS = (ResidualAttentionBlock, Bottleneck)  # residual blocks of the towers


class TextOutput(NamedTuple):
    """Outputs of the text tower.

    Attributes:
        text_states: hidden states after the final layer norm.
        text_embedding: projected state of the end token, not normalized.
    """

    text_states: Float[Tensor, "batch length width"]
    text_embedding: Float[Tensor, "batch dim"]


def build_clip(
    *, embed_dim: int, vision: dict[str, Any], text: dict[str, Any], quick_gelu: bool = False
) -> CLIP:
    """Build open_clip's CLIP with random weights.

    Args:
        embed_dim: width of the joint embedding space.
        vision: fields of `open_clip.model.CLIPVisionCfg`: image_size, patch_size, width, layers,
            head_width, … Four numbers as `layers` build a ResNet.
        text: fields of `open_clip.model.CLIPTextCfg`: context_length, vocab_size, width, heads,
            layers, …
        quick_gelu: use OpenAI's activation, which its weights need.

    Raises:
        ValueError: a width, image size or number of heads is not divisible.
    """
    if isinstance(vision.get("layers"), int):
        _check_divides("vision width", vision["width"], "head width", vision.get("head_width", 64))
        _check_divides("image_size", vision["image_size"], "patch_size", vision["patch_size"])
    else:
        _check_divides("image_size", vision["image_size"], "the ResNet's stride", 32)
    _check_divides("text width", text["width"], "text heads", text["heads"])
    return CLIP(embed_dim, CLIPVisionCfg(**vision), CLIPTextCfg(**text), quick_gelu=quick_gelu)


def text_tower(model: nn.Module) -> Any:
    """Return a CLIP's text tower: the model itself, or the module of a custom tower."""
    return getattr(model, "text", model)


def encode_text(model: nn.Module, tokens: Int64[Tensor, "batch length"]) -> TextOutput:
    """Return the hidden states and the embedding (`model.encode_text(tokens)`) in one pass.

    With causal attention, `length` may be shorter than the context if it includes every end token.
    """
    tower = text_tower(model)
    dtype = tower.transformer.get_cast_dtype()
    length = tokens.shape[1]
    mask = tower.attn_mask
    states = tower.token_embedding(tokens).to(dtype)  # (B, L, W)
    states = states + tower.positional_embedding[:length].to(dtype)
    states = tower.transformer(states, attn_mask=None if mask is None else mask[:length, :length])
    states = tower.ln_final(states)
    pool = tower.text_pool_type if tower is model else tower.pool_type
    end = tower.text_eos_id if tower is model else tower.eos_id
    pooled = text_global_pool(states, tokens, pool, eos_token_id=end)  # (B, W)
    projection = tower.text_projection
    if isinstance(projection, nn.Linear):
        pooled = projection(pooled)  # (B, D)
    elif projection is not None:
        pooled = pooled @ projection  # (B, D)
    return TextOutput(states, pooled)


def prepare_image(
    image: Shaped[Tensor, "batch 3 height width"],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "batch 3 size size"]:
    """Crop, resize (bicubic, antialiased) and normalize images for CLIP's image tower.

    Args:
        image: uint8, or float in [-1, 1]; the central square is used.
        size: side of the result in pixels.
        mean: mean of each channel in [0, 1].
        std: standard deviation of each channel.
    """
    image = (to_float(image) if image.dtype == torch.uint8 else image.float()) / 2 + 0.5
    height, width = image.shape[-2:]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    image = image[..., top : top + edge, left : left + edge]
    if edge != size:
        image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 1)

    def filled(values: Sequence[float]) -> Tensor:  # copying numbers would make a GPU wait
        return torch.cat([image.new_full((1, 1, 1), value) for value in values])

    return (image - filled(mean)) / filled(std)


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that identify the weights (SHA-256, truncated).

    They depend on names, dtypes, shapes and bytes, not on order, device or memory layout.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def clip_fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of a CLIP's weights rounded to float16.

    A bundle in float16 has the same CLIP as the bundle that it was converted from, so its stages
    and stored embeddings still belong to it.
    """
    return fingerprint(
        {name: t.half() if t.is_floating_point() else t for name, t in state_dict.items()}
    )


def _check_divides(name: str, whole: int, divisor: str, part: int) -> None:
    if whole % part:
        raise ValueError(f"{divisor} ({part}) must divide {name} ({whole})")
