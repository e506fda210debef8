"""A tiny pipeline with random weights, made and saved by diffusers' and transformers' classes.

The sizes keep Karlo's proportions where diffusers allows no others. All attention has two heads, so
that the order of the heads' rows matters.
"""

import json
from pathlib import Path
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
TRANSFORMER = {
    "hidden_size": DIM,
    "intermediate_size": 4 * DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": DIM,
}
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


@pytest.fixture(scope="session")
def karlo(tmp_path_factory) -> SimpleNamespace:
    """The components, the folder that they saved, and the bundle converted from it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = components()
    root = tmp_path_factory.mktemp("karlo")
    folder, models = root / "hub", root / "models"
    for name, part in vars(parts).items():
        part.save_pretrained(folder / name)
    write_schedulers(folder)
    recipes = {stage: convert.karlo_recipe(stage) for stage in STAGES}
    convert_karlo(folder, models, recipes)
    return SimpleNamespace(parts=parts, folder=folder, models=models, recipes=recipes)


def write_schedulers(folder: Path) -> None:
    """Write the scheduler configs as on the hub."""
    for name, prediction, variance in (
        ("prior", "sample", "fixed_small_log"),
        ("decoder", "epsilon", "learned_range"),
        ("super_res", "epsilon", "fixed_small_log"),
    ):
        where = folder / f"{name}_scheduler"
        where.mkdir()
        content = {
            "_class_name": "UnCLIPScheduler",
            "prediction_type": prediction,
            "variance_type": variance,
        }
        (where / "scheduler_config.json").write_text(json.dumps(content))
