"""A bundle of ours as a folder of diffusers' unCLIP pipeline, component by component."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file
from torch import Tensor

from unclip import bundle
from unclip.interop import configs
from unclip.interop.folder import Component, write_component, write_json
from unclip.interop.karlo import STAGES, meta
from unclip.interop.layout import write
from unclip.interop.matches import (
    clip_matches,
    decoder_matches,
    prior_matches,
    upsampler_matches,
)
from unclip.stages import Stage

# What diffusers' pipeline does, and a stage that does otherwise cannot be said in its files.
_FIXED: dict[str, dict[str, Any]] = {
    "clip": {"normalize": False, "vocabulary": None},
    "prior": {
        "normalize": False,
        "linear": None,
        "text_encoder": None,
        "text_scaling.scaling": "none",
        "null_text.learned": False,
    },
    "decoder": {
        "network.feature_maps": None,
        "text_encoder": None,
        "image_scaling.scaling": "none",
        "text_scaling.scaling": "none",
        "null_text.learned": False,
    },
    "upsampler_256": {"residual": False, "scale": 4},
}
_INDEX = {
    "prior": ("diffusers", "PriorTransformer"),
    "decoder": ("diffusers", "UNet2DConditionModel"),
    "text_proj": ("unclip", "UnCLIPTextProjModel"),  # the pipeline's own module, as the hub has it
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "super_res_first": ("diffusers", "UNet2DModel"),
    "super_res_last": ("diffusers", "UNet2DModel"),
    **{name: ("diffusers", "UnCLIPScheduler") for name in configs.SCHEDULERS.values()},
}


def convert_to_diffusers(source: str | Path, out: str | Path) -> None:
    """Writes the components of UnCLIPPipeline, and the image encoder that variations take.

    The null caption is not written, since diffusers' pipeline encodes an empty one.

    Raises:
        FileNotFoundError: naming the stage that the bundle lacks.
        ValueError: naming what diffusers' classes cannot express.
    """
    out = Path(out)
    paths = {name: bundle.stage_file(source, name) for name in STAGES}
    stages = {name: _expressible(name, path) for name, path in paths.items()}
    layouts = {
        "clip": clip_matches(stages["clip"]),
        "prior": prior_matches(stages["prior"], "diffusers"),
        "decoder": decoder_matches(stages["decoder"], "diffusers"),
        "upsampler_256": upsampler_matches(stages["upsampler_256"], "diffusers"),
    }
    contents = _configs(stages)
    for name, layout in layouts.items():
        tensors = load_file(paths[name])
        for part, matches in layout.items():
            config = contents[part] | _kept(name, tensors)
            file = f"{'model' if name == 'clip' else 'diffusion_pytorch_model'}.safetensors"
            write_component(out, Component(Path(part), config, write(tensors, matches)), file)
    for name, folder in configs.SCHEDULERS.items():
        write_json(out / folder / "scheduler_config.json", configs.scheduler_config(stages[name]))
    processor = configs.processor_config(stages["clip"])
    write_json(out / "feature_extractor" / "preprocessor_config.json", processor)
    _write_tokenizer(out / "tokenizer", stages["clip"].tokenizer.context_length)
    index = {name: list(place) for name, place in _INDEX.items()}
    write_json(out / "model_index.json", {"_class_name": "UnCLIPPipeline", **index})


def _expressible(name: str, path: Path) -> Stage:
    """A stage without memory, if diffusers can say all that it is."""
    metadata = bundle.read_metadata(path)
    stage = meta(metadata.recipe)
    schedule = metadata.recipe.get("diffusion", {}).get("schedule", "cosine")
    found = {"schedule": schedule} | {key: _attribute(stage, key) for key in _FIXED[name]}
    for key, wanted in {"schedule": "cosine", **_FIXED[name]}.items():
        if found[key] != wanted:
            raise ValueError(f"{path}: {key} is {found[key]!r}; diffusers has only {wanted!r}")
    return stage


def _attribute(stage: Stage, name: str) -> Any:
    value: Any = stage
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _configs(stages: Mapping[str, Stage]) -> dict[str, dict[str, Any]]:
    decoder, upsampler = stages["decoder"], stages["upsampler_256"]
    size = decoder.image_size
    last = upsampler.last_network or upsampler.network
    return {
        "text_encoder": configs.text_config(stages["clip"]),
        "image_encoder": configs.vision_config(stages["clip"]),
        "prior": configs.prior_config(stages["prior"].network),
        "decoder": configs.decoder_config(decoder.network, size),
        "text_proj": configs.text_proj_config(decoder.network),
        "super_res_first": configs.upsampler_config(upsampler.network, size * upsampler.scale),
        "super_res_last": configs.upsampler_config(last, size * upsampler.scale),
    }


def _kept(name: str, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The CLIP's logit scale, for which transformers' encoders have no tensor."""
    if name != "clip":
        return {}
    return {"logit_scale_init_value": tensors["model.logit_scale"].item()}


def _write_tokenizer(folder: Path, context_length: int) -> None:
    """CLIP's vocabulary and merges, padded with 0 as Karlo's texts are."""
    clip = SimpleTokenizer()
    words = list(clip.encoder)
    start, end = words[-2:]
    write_json(folder / "vocab.json", clip.encoder)
    merges = [" ".join(pair) for pair in clip.bpe_ranks]
    text = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": words[0]}
    write_json(folder / "special_tokens_map.json", special)
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, **special}, indent=2))
