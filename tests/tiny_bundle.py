"""Recipes of the smallest real stages, and bundles of them with random weights."""

import copy
from pathlib import Path

import torch

from unclip import bundle

EMBEDDING_DIM, TEXT_WIDTH, CONTEXT_LENGTH = 8, 16, 24
NAMES = ("clip", "prior", "decoder", "upsampler_256", "upsampler_1024")
ON_CLIP = ("prior", "prior_ar", "decoder")


def _make(target: str, **arguments) -> dict:
    return {"_target_": f"unclip.{target}", **arguments}


_SAMPLER = _make("diffusion.ddim", _partial_=True, steps=2, eta=1.0)
_DIFFUSION = _make("diffusion.GaussianDiffusion", prediction="x0")
_DENSITY = _make("diffusion.LogitNormal", mean=0.6, std=1.0)
_TEXT = {"text_width": TEXT_WIDTH, "context_length": CONTEXT_LENGTH}
_TRANSFORMER = {"embedding_dim": EMBEDDING_DIM, **_TEXT, "width": 16, "layers": 1, "heads": 2}
_UNET = _make("networks.UNet", channels=8, multipliers=[1], blocks=1, groups=4, head_width=4)
_CONTEXT = {"image_embedding": EMBEDDING_DIM, "text_states": TEXT_WIDTH, "context_width": 8}
_MAPS = {"levels": [0], "hidden": 8, "rank": 2, "image_size": 64}
_VISION = {"vision_width": 16, "vision_layers": 1, "vision_head_width": 8}


def _upsampler(name: str, patch: int) -> dict:
    parts = {"diffusion": _DIFFUSION, "sampler": _SAMPLER, "name": name}
    network = {**_UNET, "in_channels": 6, "patch": patch}
    return _make("stages.UpsamplerStage", network=network, **parts)


_RECIPES = {
    "clip": _make(
        "stages.ClipStage",
        embed_dim=EMBEDDING_DIM,
        **{"image_size": 16, "patch_size": 8, **_VISION},
        **{**_TEXT, "text_layers": 1, "text_heads": 2, "vocabulary_size": 520},
    ),
    "prior": _make(
        "stages.PriorStage",
        network=_make("networks.PriorTransformer", **_TRANSFORMER),
        **{"diffusion": _DIFFUSION, "sampler": _SAMPLER},
        **{"text_width": TEXT_WIDTH, "guidance_scale": 1.5},
    ),
    "prior_ar": _make(
        "stages.AutoregressivePriorStage",
        network=_make(
            "networks.ARTransformer", components=EMBEDDING_DIM, buckets=16, **_TRANSFORMER
        ),
        **{"text_width": TEXT_WIDTH, "guidance_scale": 1.5},
    ),
    "decoder": _make(
        "stages.DecoderStage",
        network={
            **{**_UNET, "attention_levels": [0], "patch": 8},
            **{"conditioning": _CONTEXT, "feature_maps": _MAPS},
        },
        **{"diffusion": {**_DIFFUSION, "timestep_density": _DENSITY}, "sampler": _SAMPLER},
        **{"embedding_dim": EMBEDDING_DIM, "text_width": TEXT_WIDTH, "guidance_scale": 2.0},
    ),
    "upsampler_256": _upsampler("upsampler_256", 16),
    "upsampler_1024": _upsampler("upsampler_1024", 32),
}


def recipe(name: str) -> dict:
    """Return a copy of a stage's recipe."""
    return copy.deepcopy(_RECIPES[name])


def stage(name: str):
    """Return a stage with noise on all weights, also on those that start at zero."""
    built = bundle.build(recipe(name))
    if name == "prior_ar":
        shape = (100, EMBEDDING_DIM)
        pairs = {"image_embedding": torch.randn(shape), "text_embedding": torch.randn(shape)}
        built.fit_statistics([pairs])
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def batch(name: str) -> dict:
    """Return two random images with the features that a stage's loss takes."""
    side = 16 if name == "clip" else 64
    return {
        "key": ["a", "b"],
        "valid": torch.ones(2, dtype=torch.bool),
        "caption": ["a red cat", "a dog"],
        "image": torch.rand(2, 3, side, side) * 2 - 1,
        "low_res": torch.rand(2, 3, side // 4, side // 4) * 2 - 1,
        "image_embedding": torch.randn(2, EMBEDDING_DIM),
        "text_embedding": torch.randn(2, EMBEDDING_DIM),
        "text_states": torch.randn(2, CONTEXT_LENGTH, TEXT_WIDTH),
        "text_mask": torch.ones(2, CONTEXT_LENGTH, dtype=torch.bool),
    }


def write(folder: Path, names=NAMES) -> Path:
    """Write a bundle of these stages and return its folder."""
    torch.manual_seed(0)
    clip = None
    for name in names:
        path, own = bundle.stage_file(folder, name), clip if name in ON_CLIP else None
        bundle.save_stage(path, stage(name), recipe=recipe(name), steps=3, clip_fingerprint=own)
        if name == "clip":
            clip = bundle.read_metadata(path).clip_fingerprint
    return folder


def write_judge(folder: Path, *, steps: int = 1, extra: dict | None = None) -> None:
    """Add a judge to a bundle: a second CLIP with random weights."""
    about = {"recipe": recipe("clip"), "clip_fingerprint": None, "steps": steps, "extra": extra}
    bundle.save_stage(bundle.stage_file(folder, "judge"), stage("clip"), **about)
