"""A tiny pipeline with random weights, made and saved by diffusers' and transformers' classes.

The sizes keep Karlo's proportions where diffusers allows no others. All attention has two heads, so
that the order of the heads' rows matters.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import convert
from unclip.interop import STAGES, convert_karlo

DIM, CONTEXT = 16, 24
TRANSFORMER = {"hidden_size": DIM, "intermediate_size": 4 * DIM, "projection_dim": DIM}
TRANSFORMER |= {"num_hidden_layers": 2, "num_attention_heads": 2}
UNET = {"block_out_channels": (8, 16, 24), "layers_per_block": 1, "norm_num_groups": 4}
PLAIN_DOWN, PLAIN_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
ATTENDED_DOWN, ATTENDED_UP = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"


def upsampler() -> UNet2DModel:
    return UNet2DModel(
        **UNET,
        sample_size=256,
        in_channels=6,
        out_channels=3,
        add_attention=False,
        down_block_types=(PLAIN_DOWN,) * 3,
        up_block_types=(PLAIN_UP,) * 3,
    )


def components() -> SimpleNamespace:
    parts = SimpleNamespace(
        text_encoder=CLIPTextModelWithProjection(
            CLIPTextConfig(**TRANSFORMER, max_position_embeddings=CONTEXT)
        ),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(**TRANSFORMER, image_size=32, patch_size=8)
        ),
        prior=PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            embedding_dim=DIM,
            num_embeddings=CONTEXT,
        ),
        decoder=UNet2DConditionModel(
            **UNET,
            sample_size=64,
            in_channels=3,
            out_channels=6,
            cross_attention_dim=24,
            attention_head_dim=12,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            down_block_types=(PLAIN_DOWN, PLAIN_DOWN, ATTENDED_DOWN),
            up_block_types=(ATTENDED_UP, PLAIN_UP, PLAIN_UP),
        ),
        text_proj=UnCLIPTextProjModel(
            clip_embeddings_dim=DIM, time_embed_dim=32, cross_attention_dim=24
        ),
        super_res_first=upsampler(),
        super_res_last=upsampler(),
    )
    for part in vars(parts).values():
        part.requires_grad_(False).eval()
        for parameter in part.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    parts.prior.clip_std.copy_(0.5 + torch.rand(1, DIM))
    return parts


def tiny_recipes() -> dict[str, dict]:
    """Return the recipes of Karlo's scale, with the sizes of the components above."""
    recipes = {stage: convert.karlo_recipe(stage) for stage in STAGES}
    unet = {"channels": 8, "multipliers": [1, 2, 3], "blocks": 1, "groups": 4}
    recipes["clip"] |= {"embed_dim": DIM, "image_size": 32, "patch_size": 8}
    recipes["clip"] |= {"vision_width": DIM, "vision_layers": 2, "vision_head_width": 8}
    recipes["clip"] |= {"text_width": DIM, "text_layers": 2, "text_heads": 2}
    recipes["clip"]["context_length"] = CONTEXT
    sizes = {"embedding_dim": DIM, "text_width": DIM}
    transformer = {"context_length": CONTEXT, "width": DIM, "layers": 2, "heads": 2}
    recipes["prior"]["network"] |= sizes | transformer
    recipes["prior"]["text_width"] = DIM
    conditioning = {"image_embedding": DIM, "text_states": DIM, "context_width": 24}
    recipes["decoder"] |= sizes
    attention = {"attention_levels": [2], "head_width": 12}
    recipes["decoder"]["network"] |= unet | attention | {"conditioning": conditioning}
    for network in ("network", "last_network"):
        recipes["upsampler_256"][network] |= unet
    return recipes


@pytest.fixture(scope="session")
def karlo(tmp_path_factory) -> SimpleNamespace:
    """The components, the folder that they saved, and the bundle converted from it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = components()
    root = tmp_path_factory.mktemp("karlo")
    folder, models, recipes = root / "hub", root / "models", tiny_recipes()
    for name, part in vars(parts).items():
        part.save_pretrained(folder / name)
    convert_karlo(folder, models, recipes)
    return SimpleNamespace(parts=parts, folder=folder, models=models, recipes=recipes)
