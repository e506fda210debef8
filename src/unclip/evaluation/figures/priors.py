"""The importance of the prior, and a comparison of priors (section 5.1, figure 8; section 2.2)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from unclip.bundle import train_command
from unclip.contact_sheet import Tile
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.figures.figure import Figure, judge_images, judge_texts, sheet
from unclip.evaluation.measurement import Result, Table
from unclip.text_to_image import PRIORS, stage_of_prior


@dataclass(frozen=True, kw_only=True)
class PriorImportance(Figure):
    """Images from the caption alone, from z_t in place of z_i, and from the prior's z_i.

    Args:
        prompts: prompts that are sampled.
    """

    prompts: list[str]

    title: ClassVar[str] = "The importance of the prior (figure 8)"
    stages: ClassVar[tuple[str, ...]] = ("clip", "prior", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        """Sample each prompt with the same decoder and noise from each input."""
        cascade, prompts, size = context.cascade, self.prompts, self.size_in(context)
        seeds = [context.seed] * len(prompts)
        inputs = {
            "caption only": None,
            "caption and z_t": cascade.embedder.text(prompts).text_embedding,
            "caption and z_i of the prior": cascade.prior(prompts, seeds=seeds),
        }
        made = {
            name: cascade.decode(
                z, prompts, seeds=seeds, size=size, batch_size=self.batch_size
            ).images
            for name, z in inputs.items()
        }
        wanted = judge_texts(context, prompts)
        numbers = [
            [name, float((judge_images(context, images[64]) * wanted).sum(1).mean())]
            for name, images in made.items()
        ]
        rows = [
            [Tile(images[size][k], f"{name}: {prompt}") for name, images in made.items()]
            for k, prompt in enumerate(prompts)
        ]
        note = "Each row samples one prompt with the same noise from the three inputs."
        table = Table(["decoder input", "judge's cosine to the prompt"], numbers)
        images = {"prior_importance": sheet(rows, self.title)}
        return Result(tables={f"{len(prompts)} prompts": table}, images=images, note=note)


@dataclass(frozen=True, kw_only=True)
class Priors(Figure):
    """Comparison of the diffusion, autoregressive, linear and no prior.

    Args:
        captions: number of captions of real images.
        shown: number of them on the sheet.
    """

    captions: int
    shown: int

    title: ClassVar[str] = "Diffusion, autoregressive, linear or no prior (section 2.2)"
    stages: ClassVar[tuple[str, ...]] = ("clip", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        """Sample the captions with every prior that the bundle has."""
        cascade, real = context.cascade, context.real(SEEN)
        rows = list(range(min(self.captions, len(real))))
        real = real.take(rows)
        true, seeds = cascade.embed(list(real.images)), [context.seed + row for row in rows]
        wanted, numbers, tiles, missing = judge_texts(context, real.captions), [], [], []
        for name in PRIORS:
            try:
                z = cascade.prior(real.captions, seeds=seeds, prior=name)
            except (FileNotFoundError, ValueError):
                missing.append(f"{name}: `{train_command(stage_of_prior(name))}`")
                continue
            made = cascade.decode(z, real.captions, seeds=seeds, size=64).images[64]
            cosine = F.cosine_similarity(z, true).mean()
            agreement = (judge_images(context, made) * wanted).sum(1).mean()
            numbers.append([name, float(cosine), float(agreement)])
            shown = zip(made[: self.shown], real.captions, strict=False)
            tiles.append([Tile(image, f"{name}: {caption}") for image, caption in shown])
        tiles.append([Tile(image, "real") for image in real.images[: self.shown]])
        note = (
            "The cosine of each prior's embedding to that of the caption's real image, and the "
            "judge's cosine of the decoder's 64 px image to the caption."
        )
        if missing:
            note += f" This bundle lacks {'; '.join(missing)}."
        head = ["prior", "cosine to the real z_i", "judge's cosine to the caption"]
        tables = {f"{len(rows)} captions": Table(head, numbers)}
        images = {"priors": sheet(tiles, self.title, size=128)}
        return Result(tables=tables, images=images, note=note)
