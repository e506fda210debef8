"""Priors and guidance compared by the judge (section 2.2, section 5.1, figures 8 to 11)."""

import torch
import torch.nn.functional as F

from unclip.bundle import train_command
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.decoder_distance import NETWORK
from unclip.evaluation.features import Features
from unclip.evaluation.figures.figure import Figure, judged_cosines, sheet, tiles, unit
from unclip.evaluation.frechet import frechet
from unclip.evaluation.measurement import Result, Table
from unclip.evaluation.networks import encode_images
from unclip.text_to_image import PRIORS, stage_of_prior


class PriorImportance(Figure):
    """Images from the caption alone, from z_t in place of z_i, and from the prior's z_i."""

    prompts: list[str]  # prompts that are sampled

    title = "The importance of the prior (figure 8)"
    stages = ("clip", "prior", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        """Sample each prompt with the same decoder and noise from each input."""
        cascade, prompts = context.cascade, self.prompts
        seeds = [context.seed] * len(prompts)
        inputs = {
            "caption only": None,
            "caption and z_t": cascade.embedder.text(prompts).text_embedding,
            "caption and z_i of the prior": cascade.prior(prompts, seeds=seeds),
        }
        options = {"size": self.size_in(context), "batch_size": self.batch_size, "seeds": seeds}
        made = {name: cascade.decode(z, prompts, **options).images for name, z in inputs.items()}
        rows = [
            tiles([images[options["size"]][k] for images in made.values()], names)
            for k, prompt in enumerate(prompts)
            if (names := [f"{name}: {prompt}" for name in made])
        ]
        numbers = [
            [name, float(judged_cosines(context, images[64], prompts).diagonal().mean())]
            for name, images in made.items()
        ]
        table = Table(["decoder input", "judge's cosine to the prompt"], numbers)
        return Result(
            tables={f"{len(prompts)} prompts": table},
            images={"prior_importance": sheet(rows, self.title)},
            note="Each row samples one prompt with the same noise from the three inputs.",
        )


class Priors(Figure):
    """Comparison of the diffusion, autoregressive, linear and no prior."""

    captions: int  # number of captions of real images
    shown: int  # number of captions on the sheet

    title = "Diffusion, autoregressive, linear or no prior (section 2.2)"
    stages = ("clip", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        """Sample the captions with every prior that the bundle has."""
        cascade, real = context.cascade, context.real(SEEN)
        real = real.take(range(min(self.captions, len(real))))
        seeds = [context.seed + k for k in range(len(real))]
        true, captions, shown = cascade.embed(list(real.images)), real.captions, self.shown
        numbers, rows, missing = [], [], []
        for name in PRIORS:
            try:
                z = cascade.prior(captions, seeds=seeds, prior=name)
            except (FileNotFoundError, ValueError):
                missing.append(f"{name}: `{train_command(stage_of_prior(name))}`")
                continue
            made = cascade.decode(z, captions, seeds=seeds, size=64).images[64]
            cosine = F.cosine_similarity(z, true).mean()
            agreement = judged_cosines(context, made, captions).diagonal().mean()
            numbers.append([name, float(cosine), float(agreement)])
            rows.append(tiles(made, [f"{name}: {caption}" for caption in captions[:shown]]))
        rows.append(tiles(real.images, ["real"] * shown))
        note = (
            "The cosine of each prior's embedding to that of the caption's real image, and the "
            "judge's cosine of the decoder's 64 px image to the caption."
        )
        if missing:
            note += f" This bundle lacks {'; '.join(missing)}."
        head = ["prior", "cosine to the real z_i", "judge's cosine to the caption"]
        tables = {f"{len(real)} captions": Table(head, numbers)}
        return Result(tables=tables, images={"priors": sheet(rows, self.title, 128)}, note=note)


class Guidance(Figure):
    """Agreement, diversity and distance over the decoder's guidance scale."""

    scales: list[float]  # guidance scales of the decoder
    captions: int
    each: int  # number of images per caption

    title = "Guidance against fidelity and diversity (figures 9 to 11)"
    stages = ("clip", "prior", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        """Sample the same captions with the same noise at each scale."""
        cascade, real = context.cascade, context.real(SEEN)
        real = real.take(range(min(self.captions * self.each, len(real))))
        captions = real.captions[: self.captions]
        prompts = [caption for caption in captions for _ in range(self.each)]
        key = ("guidance", len(real))
        reference = context.features_of(NETWORK, key, real.images)
        z = cascade.prior(captions, seeds=[context.seed] * len(captions))
        z = z.repeat_interleave(self.each, dim=0)
        seeds, numbers, rows = [context.seed + k for k in range(len(prompts))], [], []
        for scale in self.scales:
            made = cascade.decode(z, prompts, seeds=seeds, size=64, guidance_scale=scale).images[64]
            distance = frechet(
                context.features_of(NETWORK, (*key, self.each, scale), made), reference
            )
            agreement = float(judged_cosines(context, made, prompts).diagonal().mean())
            varied = diversity(encode_images(context.judge, made), self.each)
            numbers.append([f"{scale:g}", agreement, varied, distance])
            names = [f"s {scale:g}: {text}" for text in captions[:8]]
            rows.append(tiles(made[:: self.each], names))
        note = (
            "Agreement: the judge's cosine to the caption. Diversity: 1 - the judge's mean cosine "
            "between images of one caption and one z_i, so only the decoder varies. Distance: "
            "Fréchet distance of EfficientNet-Lite0 features to as many real images; comparable "
            "only within this table, because n is small. `src/evaluate.py -m guidance=…` measures "
            "a bundle."
        )
        table = Table(["guidance", "agreement", "diversity", "distance"], numbers)
        tables = {f"{len(captions)} captions × {self.each} images": table}
        return Result(tables=tables, images={"guidance": sheet(rows, self.title, 128)}, note=note)


def diversity(embeddings: Features, each: int) -> float:
    """Return 1 - the mean cosine between different embeddings of each group of `each`."""
    groups = unit(embeddings).unflatten(0, (-1, each))
    cosines = groups @ groups.mT  # (groups, each, each)
    different = ~torch.eye(each, dtype=torch.bool)
    return float(1 - cosines[:, different].mean())
