"""What the prior is good for, and which one (section 5.1, figure 8; section 2.2)."""

from dataclasses import dataclass

import torch

from unclip.bundle import train_command
from unclip.contact_sheet import Tile
from unclip.evaluation.figures.base import Drawn, Figure, Studio, Table, sheet
from unclip.text_to_image import PRIORS, stage_of_prior


@dataclass(frozen=True, kw_only=True)
class PriorImportance(Figure):
    """Args: prompts: what is drawn."""

    prompts: list[str]

    title = "The importance of the prior (figure 8)"
    about = (
        "Each row draws one prompt by the same decoder and noise, told: the caption alone; the "
        "caption and its text embedding z_t in place of z_i; the caption and the prior's z_i."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Draws it."""
        cascade, prompts = studio.cascade, self.prompts
        seeds = [studio.seed] * len(prompts)
        given = {
            "caption only": None,
            "caption and z_t": cascade.embedder.text(prompts).text_embedding,
            "caption and z_i of the prior": cascade.prior(prompts, seeds=seeds),
        }
        made = {
            name: cascade.decode(z, prompts, seeds=seeds, **studio.how) for name, z in given.items()
        }
        wanted = studio.judged_texts(prompts)
        numbers = [
            [name, float((studio.judged(part.images[64]) * wanted).sum(1).mean())]
            for name, part in made.items()
        ]
        rows = [
            [Tile(part.images[studio.size][k], f"{name}: {prompt}") for name, part in made.items()]
            for k, prompt in enumerate(prompts)
        ]
        head = ["the decoder is told", "judge's cosine to the prompt"]
        return Drawn(
            {"prior_importance": sheet(rows, self.title)},
            {f"{len(prompts)} prompts": Table(head, numbers)},
        )


@dataclass(frozen=True, kw_only=True)
class Priors(Figure):
    """Args: captions: how many real pictures' captions; shown: of these, in the picture."""

    captions: int
    shown: int

    title = "Autoregressive, diffusion, linear or no prior (section 2.2)"
    about = (
        "The cosine of each prior's embedding to that of the caption's real picture, and the "
        "judge's cosine of the decoder's 64 px picture to the caption."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Draws it."""
        cascade, real = studio.cascade, studio.real(64)
        rows = list(range(min(self.captions, len(real))))
        real = real.take(rows)
        true, seeds = cascade.embed(list(real.images)), [studio.seed + row for row in rows]
        wanted, numbers, tiles, missing = studio.judged_texts(real.captions), [], [], []
        for name in PRIORS:
            try:
                z = cascade.prior(real.captions, seeds=seeds, prior=name)
            except (FileNotFoundError, ValueError):
                missing.append(f"{name}: `{train_command(stage_of_prior(name))}`")
                continue
            made = cascade.decode(z, real.captions, seeds=seeds, size=64).images[64]
            cosine = torch.nn.functional.cosine_similarity(z, true).mean()
            agreement = (studio.judged(made) * wanted).sum(1).mean()
            numbers.append([name, float(cosine), float(agreement)])
            tiles.append(
                [
                    Tile(image, f"{name}: {caption}")
                    for image, caption in zip(made[: self.shown], real.captions, strict=False)
                ]
            )
        tiles.append([Tile(image, "real") for image in real.images[: self.shown]])
        head = ["prior", "cosine to the real z_i", "judge's cosine to the caption"]
        remark = f"This bundle lacks {'; '.join(missing)}." if missing else ""
        return Drawn(
            {"priors": sheet(tiles, self.title, size=128)},
            {f"{len(rows)} captions": Table(head, numbers)},
            remark,
        )
