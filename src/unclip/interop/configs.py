"""The config.json of each component: read as sizes of our networks, and written from them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from unclip.interop.folder import Component
from unclip.networks import PriorTransformer, UNet
from unclip.stages import ClipStage, DiffusionStage

Config = Mapping[str, Any]

COMPONENTS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last")
ENCODERS = ("text_encoder", "image_encoder")
SCHEDULERS = {
    "prior": "prior_scheduler",
    "decoder": "decoder_scheduler",
    "upsampler_256": "super_res_scheduler",
}

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

# Block types of a resolution without attention and with it.
_DOWN = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
_UP = ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D")


def prior_sizes(component: Component) -> dict[str, Any]:
    """`PriorTransformer`'s arguments from diffusers' PriorTransformer."""
    config = component.config
    _check(component, _PRIOR)
    heads = config["num_attention_heads"]
    return {
        "embedding_dim": config["embedding_dim"],
        "text_width": config["embedding_dim"],
        "context_length": config["num_embeddings"],
        "width": heads * config["attention_head_dim"],
        "layers": config["num_layers"],
        "heads": heads,
    }


def prior_config(network: PriorTransformer) -> dict[str, Any]:
    """Of diffusers' PriorTransformer."""
    heads, width = network.blocks[0].heads, network.query.shape[2]
    _same("text_width", network.text_in.in_features, "embedding_dim", network.embedding_dim)
    return {
        "_class_name": "PriorTransformer",
        **_PRIOR,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": len(network.blocks),
        "embedding_dim": network.embedding_dim,
        "num_embeddings": network.positions.shape[1] - 4,
    }


def decoder_sizes(decoder: Component, text_proj: Component) -> dict[str, Any]:
    """`UNet`'s arguments from diffusers' UNet2DConditionModel and UnCLIPTextProjModel."""
    config, text = decoder.config, text_proj.config
    _check(decoder, _DECODER)
    attended = [kind == _DOWN[1] for kind in config["down_block_types"]]
    _check(decoder, _block_types(attended))
    return {
        **_unet_sizes(decoder),
        "attention_levels": [i for i, attends in enumerate(attended) if attends],
        "head_width": config["attention_head_dim"],
        "conditioning": {
            "image_embedding": text["clip_embeddings_dim"],
            "text_states": text["clip_embeddings_dim"],
            "context_width": text["cross_attention_dim"],
            "image_tokens": text["clip_extra_context_tokens"],
        },
    }


def upsampler_sizes(component: Component) -> dict[str, Any]:
    """`UNet`'s arguments from diffusers' UNet2DModel."""
    _check(component, _UPSAMPLER)
    _check(component, _block_types([False] * len(component.config["block_out_channels"])))
    return _unet_sizes(component)


def decoder_config(network: UNet, image_size: int) -> dict[str, Any]:
    """Of diffusers' UNet2DConditionModel."""
    attended = [len(level.attention) > 0 for level in network.down]
    block = network.middle_attention
    if block is None or network.conditioning is None:
        raise ValueError("a decoder needs attention to be a UNet2DConditionModel")
    return {
        "_class_name": "UNet2DConditionModel",
        **_DECODER,
        **_unet_config(network, image_size),
        **_block_types(attended),
        "attention_head_dim": block.qkv.in_features // block.heads,
        "cross_attention_dim": network.conditioning.text_norm.normalized_shape[0],
    }


def text_proj_config(network: UNet) -> dict[str, Any]:
    """Of diffusers' UnCLIPTextProjModel."""
    part = network.conditioning
    dim, width = part.image_to_time.in_features, part.text_to_context.in_features
    _same("text_states", width, "image_embedding", dim)
    return {
        "_class_name": "UnCLIPTextProjModel",
        "clip_embeddings_dim": dim,
        "clip_extra_context_tokens": part.image_tokens,
        "cross_attention_dim": part.text_norm.normalized_shape[0],
        "time_embed_dim": part.image_to_time.out_features,
    }


def upsampler_config(network: UNet, image_size: int) -> dict[str, Any]:
    """Of diffusers' UNet2DModel."""
    if network.middle_attention is not None:
        raise ValueError("an upsampler with attention cannot be a UNet2DModel without")
    return {
        "_class_name": "UNet2DModel",
        **_UPSAMPLER,
        **_unet_config(network, image_size),
        **_block_types([False] * len(network.down)),
    }


def scheduler_config(stage: DiffusionStage) -> dict[str, Any]:
    """Of diffusers' UnCLIPScheduler, which knows the cosine schedule alone."""
    diffusion = stage.diffusion
    if diffusion.prediction not in _PREDICTIONS or diffusion.variance not in _VARIANCES:
        raise ValueError(
            f"{stage.name} predicts {diffusion.prediction} with a variance {diffusion.variance}, "
            "which diffusers' UnCLIPScheduler does not know"
        )
    return {
        "_class_name": "UnCLIPScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "clip_sample_range": stage.clip_range if stage.name == "prior" else 1.0,
        "num_train_timesteps": diffusion.timesteps,
        "prediction_type": _PREDICTIONS[diffusion.prediction],
        "variance_type": _VARIANCES[diffusion.variance],
    }


def clip_sizes(text: Component, vision: Component) -> dict[str, Any]:
    """`ClipStage`'s arguments from transformers' two encoders."""
    for component in (text, vision):
        _check(component, _ENCODER)
        _check(component, {"intermediate_size": 4 * component.config["hidden_size"]})
    _check(text, {"vocab_size": 49408})
    _check(vision, {name: text.config[name] for name in ("hidden_act", "projection_dim")})
    if text.config["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"{text.where}/config.json: hidden_act is {text.config['hidden_act']}")
    return {
        "embed_dim": text.config["projection_dim"],
        "image_size": vision.config["image_size"],
        "patch_size": vision.config["patch_size"],
        "vision_width": vision.config["hidden_size"],
        "vision_layers": vision.config["num_hidden_layers"],
        "vision_head_width": vision.config["hidden_size"] // vision.config["num_attention_heads"],
        "text_width": text.config["hidden_size"],
        "text_layers": text.config["num_hidden_layers"],
        "text_heads": text.config["num_attention_heads"],
        "context_length": text.config["max_position_embeddings"],
        "quick_gelu": _ACTIVATIONS[text.config["hidden_act"]],
    }


def text_config(stage: ClipStage) -> dict[str, Any]:
    """Of transformers' CLIPTextModelWithProjection."""
    model = stage.model
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        **_encoder_config(model.transformer, stage.quick_gelu),
        "max_position_embeddings": model.positional_embedding.shape[0],
        "projection_dim": model.text_projection.shape[1],
        "vocab_size": model.vocab_size,
        "bos_token_id": model.vocab_size - 2,
        "eos_token_id": model.vocab_size - 1,
        "pad_token_id": 0,
    }


def vision_config(stage: ClipStage) -> dict[str, Any]:
    """Of transformers' CLIPVisionModelWithProjection."""
    tower = stage.model.visual
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **_encoder_config(tower.transformer, stage.quick_gelu),
        "image_size": stage.image_size,
        "patch_size": tower.patch_size[0],
        "projection_dim": tower.proj.shape[1],
    }


def processor_config(stage: ClipStage) -> dict[str, Any]:
    """Of transformers' CLIPImageProcessor."""
    edge = stage.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": edge},
        "crop_size": {"height": edge, "width": edge},
        "image_mean": list(stage.image_mean),
        "image_std": list(stage.image_std),
        "resample": 3,
    }


def _encoder_config(transformer: nn.Module, quick_gelu: bool) -> dict[str, Any]:
    block = transformer.resblocks[0]
    width = block.attn.embed_dim
    return {
        **_ENCODER,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": block.attn.num_heads,
        "num_hidden_layers": len(transformer.resblocks),
    }


def _unet_sizes(component: Component) -> dict[str, Any]:
    config = component.config
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(
            f"{component.where}/config.json: block_out_channels {widths} are no multiples of "
            "the first"
        )
    shift = config.get("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise ValueError(f"{component.where}/config.json: resnet_time_scale_shift is {shift}")
    return {
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": config["layers_per_block"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "groups": config["norm_num_groups"],
        "scale_shift": shift == "scale_shift",
    }


def _unet_config(network: UNet, image_size: int) -> dict[str, Any]:
    if network.patch != 1:
        raise ValueError(f"a network with patch {network.patch} has no counterpart in diffusers")
    blocks = network.down[0].blocks
    return {
        "sample_size": image_size,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": [level.blocks[0].conv_in.out_channels for level in network.down],
        "layers_per_block": len(blocks),
        "norm_num_groups": network.norm_out.num_groups,
        "resnet_time_scale_shift": "scale_shift" if blocks[0].scale_shift else "default",
        "dropout": blocks[0].dropout.p,
    }


def _block_types(attended: list[bool]) -> dict[str, list[str]]:
    """The names of the blocks, on the way up from the smallest resolution."""
    return {
        "down_block_types": [_DOWN[attends] for attends in attended],
        "up_block_types": [_UP[attends] for attends in reversed(attended)],
    }


def _check(component: Component, wanted: Config) -> None:
    """Refuses a setting that our networks have no counterpart of."""
    for key, value in wanted.items():
        found = component.config.get(key, value)
        if found != value:
            raise ValueError(
                f"{component.where}/config.json: {key} is {found!r}; unclip's network has {value!r}"
            )


def _same(name: str, value: int, other: str, wanted: int) -> None:
    if value != wanted:
        raise ValueError(f"{name} is {value} and {other} {wanted}: diffusers has one size for both")
