"""Guidance against fidelity and diversity (figures 9 to 11)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unclip.contact_sheet import Tile
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.decoder_distance import NETWORK
from unclip.evaluation.figures.figure import Figure, judge_images, judge_texts, sheet
from unclip.evaluation.frechet import frechet
from unclip.evaluation.measurement import Result, Table


@dataclass(frozen=True, kw_only=True)
class Guidance(Figure):
    """Agreement, diversity and distance over the decoder's guidance scale.

    Args:
        scales: guidance scales of the decoder.
        captions: number of captions.
        each: number of images per caption.
    """

    scales: list[float]
    captions: int
    each: int

    title: ClassVar[str] = "Guidance against fidelity and diversity (figures 9 to 11)"
    stages: ClassVar[tuple[str, ...]] = ("clip", "prior", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        """Sample the same captions with the same noise at each scale."""
        cascade, real = context.cascade, context.real(SEEN)
        real = real.take(list(range(min(self.captions * self.each, len(real)))))
        captions = real.captions[: self.captions]
        prompts = [caption for caption in captions for _ in range(self.each)]
        key = ("guidance", len(real))
        reference = context.features_of(NETWORK, key, real.images)
        z = cascade.prior(captions, seeds=[context.seed] * len(captions))
        z = z.repeat_interleave(self.each, dim=0)
        seeds = [context.seed + k for k in range(len(prompts))]
        wanted, numbers, rows = judge_texts(context, prompts), [], []
        for scale in self.scales:
            made = cascade.decode(z, prompts, seeds=seeds, size=64, guidance_scale=scale).images[64]
            judged = judge_images(context, made)
            features = context.features_of(NETWORK, (*key, self.each, scale), made)
            distance = frechet(features, reference)
            agreement = float((judged * wanted).sum(1).mean())
            numbers.append([f"{scale:g}", agreement, diversity(judged, self.each), distance])
            shown = list(zip(made[:: self.each], captions, strict=True))[:8]
            rows.append([Tile(image, f"s {scale:g}: {text}") for image, text in shown])
        head = ["guidance", "agreement", "diversity", "distance"]
        note = (
            "Agreement: the judge's cosine to the caption. Diversity: 1 - the judge's mean cosine "
            "between images of one caption and one z_i, so only the decoder varies. Distance: "
            "Fréchet distance of EfficientNet-Lite0 features to as many real images; comparable "
            "only within this table, because n is small. `src/evaluate.py -m guidance=…` measures "
            "a bundle."
        )
        title = f"{len(captions)} captions × {self.each} images"
        images = {"guidance": sheet(rows, self.title, size=128)}
        return Result(tables={title: Table(head, numbers)}, images=images, note=note)


def diversity(embeddings: Float[Tensor, "count dim"], each: int) -> float:
    """Return 1 - the mean cosine between different embeddings of each group of `each`."""
    groups = F.normalize(embeddings, dim=1).unflatten(0, (-1, each))
    cosines = torch.einsum("gid,gjd->gij", groups, groups)
    different = ~torch.eye(each, dtype=torch.bool)
    return float(1 - cosines[:, different].mean())
