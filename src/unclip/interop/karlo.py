"""Convert Karlo's public weights to a bundle."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unclip import bundle
from unclip.batch import Batch
from unclip.clip import ClipEmbedder
from unclip.interop.karlo_files import Component, has_checkpoints, read_checkpoints, read_component
from unclip.interop.karlo_layout import (
    Layout,
    clip_layout,
    convert_tensors,
    decoder_layout,
    prior_layout,
    upsampler_layout,
)
from unclip.interop.public_clip import write_public_clip
from unclip.recipes import meta_parameters

Recipe = dict[str, Any]

STAGES = ("clip", "prior", "decoder", "upsampler_256")
COMPONENTS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last")
ENCODERS = ("text_encoder", "image_encoder")
PUBLIC_CLIP = "ViT-L-14-quickgelu"
# log 100, the value that OpenAI's CLIPs reached; the encoders' folders do not contain it.
LOGIT_SCALE = 4.6052

LAYOUTS = {"prior": prior_layout, "decoder": decoder_layout, "upsampler_256": upsampler_layout}


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
        recipes: recipe of each stage at Karlo's scale.
        clip: a folder with text_encoder and image_encoder, or the file or tag of open_clip's
            ViT-L/14 weights; None reads the encoders from `source`.
        report: function called with the path of each file written.

    Raises:
        FileNotFoundError: naming the missing file.
        ValueError: naming the tensor that does not fit.
    """
    source, out = Path(source), Path(out)
    style = "karlo" if has_checkpoints(source) else "diffusers"
    if style == "diffusers":
        components = {name: read_component(source, name) for name in COMPONENTS}
    elif clip is not None:
        components = read_checkpoints(source)
    else:
        raise FileNotFoundError(
            f"{source} contains Karlo's checkpoints, whose CLIP is a program that is not run: "
            "add --clip with open_clip's ViT-L-14, a file or the tag openai"
        )
    path = bundle.stage_file(out, "clip")
    encoders = source if clip is None else Path(clip)
    if encoders.is_dir():
        scale = {"model.logit_scale": torch.tensor(LOGIT_SCALE)}
        encoders = {name: read_component(encoders, name) for name in ENCODERS}
        _write_stage(path, recipes["clip"], encoders, clip_layout, constants=scale)
    else:
        write_public_clip(path, PUBLIC_CLIP, encoders, normalize=False)
    report(path)
    embedder = bundle.load_embedder(path)
    for name, layout in LAYOUTS.items():
        path = bundle.stage_file(out, name)
        _write_stage(path, recipes[name], components, partial(layout, style=style), embedder)
        report(path)


def _write_stage(
    path: Path,
    recipe: Recipe,
    components: Mapping[str, Component],
    layout: Callable[[Any], Layout],
    embedder: ClipEmbedder | None = None,
    constants: dict[str, Tensor] | None = None,
) -> None:
    """Write a stage: its constants, CLIP's empty caption as null, and the components' tensors."""
    with meta_parameters():  # no memory for weights
        stage = bundle.build(recipe)
    if embedder is not None:
        stage.fit_null_text(cast(Batch, embedder.text([""])._asdict()))
    expected = stage.state_dict()
    tensors = {key: tensor for key, tensor in expected.items() if not tensor.is_meta}
    for name, matches in layout(stage).items():
        tensors |= convert_tensors(components[name], matches, expected)
    bundle.save_stage(
        path,
        stage,
        recipe=recipe,
        steps=0,
        clip_fingerprint=embedder.fingerprint if embedder and stage.needs_clip else None,
        state_dict=tensors | (constants or {}),
    )
