"""Convert Karlo's public weights to a bundle."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unclip import bundle
from unclip.clip import ClipEmbedder
from unclip.interop import karlo_config
from unclip.interop.karlo_files import (
    Component,
    has_checkpoints,
    read_checkpoints,
    read_component,
    read_config,
)
from unclip.interop.karlo_layout import clip_layout, decoder_layout, prior_layout, upsampler_layout
from unclip.interop.public_clip import write_public_clip
from unclip.interop.weight_mapping import Match, convert_tensors
from unclip.stages import ClipStage, DiffusionStage, Stage

Recipe = dict[str, Any]
Components = Mapping[str, Component]

STAGES = ("clip", "prior", "decoder", "upsampler_256")
COMPONENTS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last")
ENCODERS = ("text_encoder", "image_encoder")
PUBLIC_CLIP = "ViT-L-14-quickgelu"
# log 100, the value that OpenAI's CLIPs reached; the encoders' folders do not contain it.
LOGIT_SCALE = 4.6052

_LAYOUTS = {"prior": prior_layout, "decoder": decoder_layout, "upsampler_256": upsampler_layout}
_SCHEDULERS = {"prior": "prior", "decoder": "decoder", "upsampler_256": "super_res"}
# Karlo uses CLIP's embeddings without scaling.
_UNSCALED = {"prior": ("text_scaling",), "decoder": ("text_scaling", "image_scaling")}


def convert_karlo(
    source: str | Path,
    out: str | Path,
    recipes: Mapping[str, Recipe],
    *,
    clip: str | Path | None = None,
    report: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write the stages clip, prior, decoder and upsampler_256.

    Args:
        source: folder with diffusers' components, or with Karlo's original checkpoints.
        out: folder of the bundle.
        recipes: recipe of each stage at Karlo's scale; sizes in the components' configs override
            the recipes' sizes.
        clip: a folder with text_encoder and image_encoder, or the file or tag of open_clip's
            ViT-L/14 weights; None reads the encoders from `source`.
        report: function called with the path of each file written.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: naming the tensor or the setting that does not fit.
    """
    source, out, recipes = Path(source), Path(out), copy.deepcopy(dict(recipes))
    style = "karlo" if has_checkpoints(source) else "diffusers"
    if style == "diffusers":
        components = {name: read_component(source, name) for name in COMPONENTS}
        _set_sizes(recipes, components)
    elif clip is not None:
        components = read_checkpoints(source)
    else:
        raise FileNotFoundError(
            f"{source} contains Karlo's checkpoints, whose CLIP is a program that is not run: "
            "add --clip with open_clip's ViT-L-14, a file or the tag openai"
        )
    embedder = _write_clip(source if clip is None else Path(clip), out, recipes["clip"])
    report(bundle.stage_file(out, "clip"))
    for name, layout in _LAYOUTS.items():
        stage = _build_on_meta(recipes[name])
        if style == "diffusers":
            path = source / f"{_SCHEDULERS[name]}_scheduler" / "scheduler_config.json"
            karlo_config.check_scheduler(read_config(path), cast(DiffusionStage, stage))
        tensors = _convert(components, layout(stage, style), stage)
        tensors |= _constants(name, embedder)
        path = bundle.stage_file(out, name)
        _save(path, stage, recipes[name], tensors, embedder.fingerprint)
        report(path)


def _build_on_meta(recipe: Recipe) -> Stage:
    """Build a stage without memory for its weights."""
    with torch.device("meta"):
        return bundle.build(recipe)


def _set_sizes(recipes: dict[str, Recipe], components: Components) -> None:
    """Replace the sizes in recipes by those of the components."""
    prior, decoder, upsampler = (recipes[name] for name in STAGES[1:])
    prior["network"] |= karlo_config.prior_sizes(components["prior"])
    prior["text_width"] = prior["network"]["text_width"]
    decoder["network"] |= karlo_config.decoder_sizes(components["decoder"], components["text_proj"])
    sizes = decoder["network"]["conditioning"]
    decoder["embedding_dim"], decoder["text_width"] = sizes["image_embedding"], sizes["text_states"]
    decoder["image_size"] = components["decoder"].config["sample_size"]
    first, last = components["super_res_first"], components["super_res_last"]
    upsampler["network"] |= karlo_config.upsampler_sizes(first)
    upsampler["last_network"] |= karlo_config.upsampler_sizes(last)
    upsampler["scale"] = first.config["sample_size"] // decoder["image_size"]


def _convert(
    components: Components, layout: Mapping[str, list[Match]], stage: Stage
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, matches in layout.items():
        component = components[name]
        tensors |= convert_tensors(component.tensors, matches, stage.state_dict(), component.source)
    return tensors


def _write_clip(source: Path, out: Path, recipe: Recipe) -> ClipEmbedder:
    """Write the CLIP and load it; the other stages need its empty caption and its fingerprint."""
    path = bundle.stage_file(out, "clip")
    if source.is_dir():
        encoders = {name: read_component(source, name) for name in ENCODERS}
        recipe |= karlo_config.clip_sizes(*encoders.values())
        stage = _build_on_meta(recipe)
        tensors = _convert(encoders, clip_layout(cast(ClipStage, stage)), stage)
        tensors["model.logit_scale"] = torch.tensor(LOGIT_SCALE)
        _save(path, stage, recipe, tensors, None)
    else:
        write_public_clip(path, PUBLIC_CLIP, source, normalize=False)
    return bundle.load_embedder(path)


def _save(
    path: Path, stage: Stage, recipe: Recipe, tensors: dict[str, Tensor], clip: str | None
) -> None:
    clip = clip if stage.needs_clip else None
    bundle.save_stage(
        path, stage, recipe=recipe, steps=0, clip_fingerprint=clip, state_dict=tensors
    )


def _constants(name: str, embedder: ClipEmbedder) -> dict[str, Tensor]:
    """Return a stage's tensors that Karlo does not store: scaling constants and the null caption.

    The null caption is CLIP's empty caption, of two tokens.
    """
    constants = {}
    for scaling in _UNSCALED.get(name, ()):
        constants[f"{scaling}.mean"] = torch.zeros(embedder.embedding_dim)
        constants[f"{scaling}.std"] = torch.ones(embedder.embedding_dim)
    if constants:
        empty = embedder.text([""])
        constants["null_text.states"] = empty.text_states[:, : int(empty.text_mask.sum())]
        constants["null_text.embedding"] = empty.text_embedding
    return constants
