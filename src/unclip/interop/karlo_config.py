"""Translate the config.json of diffusers' and transformers' components into sizes of our stages.

A setting that our networks have no counterpart of is an error.
"""

from collections.abc import Mapping
from typing import Any

from unclip.interop.karlo_files import Component, Config
from unclip.stages import DiffusionStage

# The settings of each class that our networks implement.
_PRIOR = {
    "added_emb_type": "prd",
    "additional_embeddings": 4,
    "clip_embed_dim": None,
    "dropout": 0.0,
    "embedding_proj_dim": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "norm_in_type": None,
    "time_embed_act_fn": "silu",
    "time_embed_dim": None,
}
_UNET = {
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "time_embedding_type": "positional",
}
_DECODER = {
    **_UNET,
    "class_embed_type": "identity",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
}
_UPSAMPLER = {**_UNET, "add_attention": False, "class_embed_type": None}
_ENCODER = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0}
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_PREDICTIONS = {"x0": "sample", "eps": "epsilon"}
_VARIANCES = {"fixed_small": "fixed_small_log", "learned_range": "learned_range"}

# Block types of a resolution without and with attention.
_DOWN = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
_UP = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")


def prior_sizes(prior: Component) -> dict[str, Any]:
    """Return `PriorTransformer`'s arguments from diffusers' PriorTransformer."""
    config = prior.config
    _check(config, _PRIOR)
    heads = config["num_attention_heads"]
    return {
        "embedding_dim": config["embedding_dim"],
        "text_width": config["embedding_dim"],
        "context_length": config["num_embeddings"],
        "width": heads * config["attention_head_dim"],
        "layers": config["num_layers"],
        "heads": heads,
    }


def decoder_sizes(decoder: Component, text_proj: Component) -> dict[str, Any]:
    """Return `UNet`'s arguments from diffusers' UNet2DConditionModel and UnCLIPTextProjModel."""
    config, text = decoder.config, text_proj.config
    _check(config, _DECODER)
    attended = [kind == _DOWN[1] for kind in config["down_block_types"]]
    _check(config, _block_types(attended))
    return {
        **_unet_sizes(config),
        "attention_levels": [i for i, has_attention in enumerate(attended) if has_attention],
        "head_width": config["attention_head_dim"],
        "conditioning": {
            "image_embedding": text["clip_embeddings_dim"],
            "text_states": text["clip_embeddings_dim"],
            "context_width": text["cross_attention_dim"],
            "image_tokens": text["clip_extra_context_tokens"],
        },
    }


def upsampler_sizes(upsampler: Component) -> dict[str, Any]:
    """Return `UNet`'s arguments from diffusers' UNet2DModel."""
    config = upsampler.config
    _check(config, _UPSAMPLER | _block_types([False] * len(config["block_out_channels"])))
    return _unet_sizes(config)


def clip_sizes(text_encoder: Component, image_encoder: Component) -> dict[str, Any]:
    """Return `ClipStage`'s arguments from transformers' two encoders."""
    text, vision = text_encoder.config, image_encoder.config
    for config in (text, vision):
        _check(config, {**_ENCODER, "intermediate_size": 4 * config["hidden_size"]})
    _check(text, {"vocab_size": 49408})
    _check(vision, {name: text[name] for name in ("hidden_act", "projection_dim")})
    if text["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"{text.path}: hidden_act is {text['hidden_act']}")
    return {
        "embed_dim": text["projection_dim"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "vision_width": vision["hidden_size"],
        "vision_layers": vision["num_hidden_layers"],
        "vision_head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "text_width": text["hidden_size"],
        "text_layers": text["num_hidden_layers"],
        "text_heads": text["num_attention_heads"],
        "context_length": text["max_position_embeddings"],
        "quick_gelu": _ACTIVATIONS[text["hidden_act"]],
    }


def check_scheduler(scheduler: Config, stage: DiffusionStage) -> None:
    """Compare diffusers' UnCLIPScheduler with a stage's diffusion.

    The scheduler's steps and clamp are not compared: they are settings of our samplers.

    Raises:
        ValueError: naming the setting that differs.
    """
    diffusion = stage.diffusion
    expected = {
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": diffusion.timesteps,
        "prediction_type": _PREDICTIONS.get(diffusion.prediction),
        "variance_type": _VARIANCES.get(diffusion.variance),
    }
    _check(scheduler, expected)


def _unet_sizes(config: Config) -> dict[str, Any]:
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"{config.path}: block_out_channels is {widths}, "
            "which must be multiples of its first value"
        )
    shift = config.get("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise ValueError(f"{config.path}: resnet_time_scale_shift is {shift}")
    return {
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": config["layers_per_block"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "groups": config["norm_num_groups"],
        "scale_shift": shift == "scale_shift",
    }


def _block_types(attended: list[bool]) -> dict[str, list[str]]:
    """Return the types of the blocks, given which resolutions have attention."""
    return {
        "down_block_types": [_DOWN[has_attention] for has_attention in attended],
        "up_block_types": [_UP[has_attention] for has_attention in reversed(attended)],
    }


def _check(config: Config, expected: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that differs; a missing one has its class's default."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"{config.path}: {key} is {config[key]!r}, but unclip has {value!r}")
