"""The first phase: a picture of each prompt as a PNG, resumable, whoever makes which."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unclip.cascade import Cascade
from unclip.evaluation.folder import PictureFolder
from unclip.evaluation.networks import weights_of
from unclip.evaluation.protocol import Prompt, Protocol, fingerprint
from unclip.evaluation.ranks import Ranks
from unclip.evaluation.sampling import Sampling, Settings
from unclip.stages import DiffusionStage
from unclip.text_to_image import stages_for


def describe(cascade: Cascade, protocol: Protocol, settings: Settings, data: str) -> dict[str, Any]:
    """What decides about the pixels, and nothing else: the batch size is no part of it."""
    drawing = ("prior", *stages_for(protocol.resolution))
    used = {name: cascade.metadata.get(name) for name in ("clip", *drawing)}
    guidance = {"prior": settings.prior_guidance_scale, "decoder": settings.guidance_scale}
    return {
        "protocol": protocol.describe(),
        "data": data,
        "stages": {name: about.fingerprint for name, about in used.items() if about},
        "recipes": {name: fingerprint(about.recipe) for name, about in used.items() if about},
        "clip": weights_of(cascade.embedder),
        "sampling": {
            name: sampling_of(cascade.stage(name), guidance.get(name), settings.steps.get(name))
            for name in drawing
        },
        "seed": settings.seed,
    }


def sampling_of(
    stage: DiffusionStage, guidance_scale: float | None, steps: int | None
) -> dict[str, Any]:
    """A stage's sampler, its arguments and its guidance: the stage's own where None is given."""
    described = {"sampler": stage.sampler.func.__name__, **stage.sampler.keywords}
    if steps is not None:
        described["steps"] = steps
    if guidance_scale is not None:
        return described | {"guidance_scale": float(guidance_scale)}
    own = {name: getattr(stage, name, None) for name in ("guidance_scale", "text_guidance_scale")}
    return described | {name: float(scale) for name, scale in own.items() if scale is not None}


def generate(
    cascade: Cascade,
    prompts: Sequence[Prompt],
    protocol: Protocol,
    settings: Settings,
    out: Path,
    *,
    data: str,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
) -> PictureFolder:
    """A picture of each prompt, in a folder of OUT that is named by the protocol and all settings.

    Picture k is made with the seed `settings.seed` + k. The prompts are cut into blocks of a batch;
    a block is skipped where all of its pictures are there, and else made whole, so that a picture
    has the same neighbours, and thus the same rounding, in every run.

    Args:
        cascade: what draws them.
        prompts: what is drawn.
        protocol: at which size.
        settings: guidance, steps, seed and batch size.
        out: where the folder is made.
        data: the fingerprint of the data that the prompts are from.
        ranks: the processes that share the work.

    Raises:
        FileNotFoundError: the bundle lacks a stage.
    """
    made_with = describe(cascade, protocol, settings, data)
    path = out / f"{protocol.name}-{fingerprint(_plain(made_with))}"
    folder = PictureFolder.create(path, prompts, made_with, seed=settings.seed)
    sampling = Sampling(settings.quiet(), cascade)
    own = ranks.blocks(len(prompts), settings.batch_size)
    with tqdm(
        total=sum(map(len, own)),
        desc=f"pictures of {protocol.name}",
        unit="picture",
        disable=not (settings.progress and ranks.first),
    ) as bar:
        for block in own:
            if folder.missing(block):
                captions = [prompts[k].text for k in block]
                images = sampling.text_to_image(
                    captions, size=protocol.resolution, first=block.start
                )
                for k, image in zip(block, images, strict=True):
                    folder.write(k, image)
            bar.update(len(block))
    ranks.wait()
    return folder


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the protocol's name, which may be changed without changing a picture."""
    return {
        **settings,
        "protocol": {
            key: value for key, value in settings["protocol"].items() if key not in ("name", "hash")
        },
    }
