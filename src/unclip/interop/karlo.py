"""Karlo's public weights as a bundle of our stages."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip import bundle
from unclip.clip import ClipEmbedder, load_public
from unclip.interop import configs
from unclip.interop.checkpoint import is_checkpoints, read_checkpoints
from unclip.interop.folder import Component, read_component, read_json
from unclip.interop.layout import Match, read
from unclip.interop.matches import (
    clip_matches,
    decoder_matches,
    prior_matches,
    upsampler_matches,
)
from unclip.stages import Stage

Recipe = dict[str, Any]
Components = Mapping[str, Component]

STAGES = ("clip", "prior", "decoder", "upsampler_256")
PUBLIC_CLIP = "ViT-L-14-quickgelu"
LOGIT_SCALE = 4.6052  # log 100, where OpenAI's CLIPs stopped: the encoders' folders do not keep it


def convert_karlo(
    source: str | Path,
    out: str | Path,
    recipes: Mapping[str, Recipe],
    *,
    clip: str | Path | None = None,
    report: Callable[[Path], None] = lambda path: None,
) -> None:
    """Writes the stages clip, prior, decoder and upsampler_256.

    Args:
        source: a copy of the hub's folder for diffusers, or one with Karlo's own files.
        out: the bundle's folder.
        recipes: of each stage at Karlo's scale; the sizes in a folder's configs go before theirs.
        clip: another folder with text_encoder and image_encoder, or open_clip's weights of
            ViT-L/14, a file or a tag; None looks for the encoders in `source`.
        report: called with each file that is written.

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: naming the tensor or setting that does not fit.
    """
    source, out, recipes = Path(source), Path(out), copy.deepcopy(dict(recipes))
    style = "karlo" if is_checkpoints(source) else "diffusers"
    if style == "karlo" and clip is None:
        raise FileNotFoundError(
            f"{source} holds Karlo's checkpoints, whose CLIP is a program and is not run: "
            "add --clip with open_clip's ViT-L-14, a file or the tag openai"
        )
    if style == "karlo":
        parts = read_checkpoints(source)
    else:
        parts = {name: read_component(source, name) for name in configs.COMPONENTS}
        _fit_recipes(recipes, parts)
    embedder = _write_clip(source if clip is None else Path(clip), out, recipes["clip"])
    report(bundle.stage_file(out, "clip"))
    constants = {"prior": _prior_constants, "decoder": _decoder_constants}
    layouts = {
        "prior": prior_matches,
        "decoder": decoder_matches,
        "upsampler_256": upsampler_matches,
    }
    for name, layout in layouts.items():
        stage = meta(recipes[name])
        if style == "diffusers":
            _check_scheduler(source, stage)
        tensors = _read(parts, layout(stage, style), stage.state_dict())
        if name in constants:
            tensors |= constants[name](stage, embedder)
        path = bundle.stage_file(out, name)
        _save(path, stage, recipes[name], tensors, embedder.fingerprint)
        report(path)


def meta(recipe: Recipe) -> Stage:
    """A stage without memory for its weights."""
    with torch.device("meta"):
        return bundle.build(recipe)


def _fit_recipes(recipes: dict[str, Recipe], parts: Components) -> None:
    """Puts a folder's sizes in place of Karlo's own."""
    prior, decoder, upsampler = (recipes[name] for name in STAGES[1:])
    prior["network"] |= configs.prior_sizes(parts["prior"])
    prior["text_width"] = prior["network"]["text_width"]
    decoder["network"] |= configs.decoder_sizes(parts["decoder"], parts["text_proj"])
    sizes = decoder["network"]["conditioning"]
    decoder["embedding_dim"], decoder["text_width"] = sizes["image_embedding"], sizes["text_states"]
    decoder["image_size"] = parts["decoder"].config["sample_size"]
    first, last = parts["super_res_first"], parts["super_res_last"]
    upsampler["network"] |= configs.upsampler_sizes(first)
    upsampler["last_network"] |= configs.upsampler_sizes(last)
    upsampler["scale"] = first.config["sample_size"] // decoder["image_size"]


def _check_scheduler(source: Path, stage: Stage) -> None:
    """Refuses another process than the recipe's; its clamp and steps are for the sampler to say."""
    wanted = configs.scheduler_config(stage)
    path = source / configs.SCHEDULERS[stage.name] / "scheduler_config.json"
    found = read_json(path)
    for key in ("beta_schedule", "num_train_timesteps", "prediction_type", "variance_type"):
        if found.get(key, wanted[key]) != wanted[key]:
            raise ValueError(f"{path}: {key} is {found[key]!r}; Karlo's is {wanted[key]!r}")


def _read(
    parts: Components, layout: Mapping[str, list[Match]], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, matches in layout.items():
        tensors |= read(parts[name].tensors, matches, like, str(parts[name].where))
    return tensors


def _write_clip(source: Path, out: Path, recipe: Recipe) -> ClipEmbedder:
    """Writes the CLIP and loads it, since the null captions are its own."""
    if source.is_dir():
        parts = {name: read_component(source, name) for name in configs.ENCODERS}
        recipe |= configs.clip_sizes(*parts.values())
        stage = meta(recipe)
        tensors = _read(parts, clip_matches(stage), stage.state_dict())
        scale = parts["text_encoder"].config.get("logit_scale_init_value", LOGIT_SCALE)
        tensors["model.logit_scale"] = torch.tensor(scale)
    else:
        stage = meta(recipe)
        public = load_public(PUBLIC_CLIP, source, normalize=False).model.state_dict()
        tensors = {f"model.{key}": tensor for key, tensor in public.items()}
    path = bundle.stage_file(out, "clip")
    _save(path, stage, recipe, tensors, None)
    return bundle.load_embedder(path)


def _save(
    path: Path, stage: Stage, recipe: Recipe, tensors: dict[str, Tensor], clip: str | None
) -> None:
    clip = clip if stage.needs_clip else None
    bundle.save_stage(
        path, stage, recipe=recipe, steps=0, clip_fingerprint=clip, state_dict=tensors
    )


def _null_text(embedder: ClipEmbedder) -> dict[str, Tensor]:
    """CLIP's empty caption, two tokens, which stands for no caption."""
    empty = embedder.text([""])
    return {
        "null_text.states": empty.text_states[:, : int(empty.text_mask.sum())],
        "null_text.embedding": empty.text_embedding,
    }


def _prior_constants(stage: Stage, embedder: ClipEmbedder) -> dict[str, Tensor]:
    return _identity("text_scaling", embedder.embedding_dim) | _null_text(embedder)


def _decoder_constants(stage: Stage, embedder: ClipEmbedder) -> dict[str, Tensor]:
    dim = embedder.embedding_dim
    scalings = _identity("text_scaling", dim) | _identity("image_scaling", dim)
    return scalings | _null_text(embedder)


def _identity(scaling: str, dim: int) -> dict[str, Tensor]:
    """Karlo takes CLIP's embeddings as they are."""
    return {f"{scaling}.mean": torch.zeros(dim), f"{scaling}.std": torch.ones(dim)}
