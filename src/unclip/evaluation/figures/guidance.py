"""Guidance against fidelity and diversity (figures 9 to 11)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.contact_sheet import Tile
from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.figures.base import Drawn, Figure, Studio, Table, sheet
from unclip.evaluation.frechet import fit_gaussian, frechet_distance


@dataclass(frozen=True, kw_only=True)
class Guidance(Figure):
    """Args: scales: of the decoder; captions: how many; each: pictures of a caption."""

    scales: list[float]
    captions: int
    each: int

    title = "Guidance against fidelity and diversity (figures 9 to 11)"
    about = (
        "Agreement: the judge's cosine to the caption. Diversity: 1 minus the judge's mean cosine "
        "between a caption's pictures, their z_i being the same, so that only the decoder differs. "
        "Distance: Fréchet, in EfficientNet-Lite0's features, to as many real pictures; few, so it "
        "only compares the rows of this table. `src/evaluate.py -m guidance=…` measures a bundle."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Measures it."""
        cascade, real = studio.cascade, studio.real(64)
        real = real.take(list(range(min(self.captions * self.each, len(real)))))
        captions = real.captions[: self.captions]
        prompts = [caption for caption in captions for _ in range(self.each)]
        network = EfficientNetLite0().to(cascade.device)
        reference = fit_gaussian(extract(network, real.images))
        z = cascade.prior(captions, seeds=[studio.seed] * len(captions))
        z = z.repeat_interleave(self.each, dim=0)
        seeds = [studio.seed + k for k in range(len(prompts))]
        wanted, numbers, rows = studio.judged_texts(prompts), [], []
        for scale in self.scales:
            made = cascade.decode(z, prompts, seeds=seeds, size=64, guidance_scale=scale).images[64]
            judged = studio.judged(made)
            distance = frechet_distance(fit_gaussian(extract(network, made)), reference)
            agreement = float((judged * wanted).sum(1).mean())
            numbers.append([f"{scale:g}", agreement, self._diversity(judged), distance])
            some = zip(made[:: self.each], captions, strict=True)
            rows.append([Tile(image, f"s {scale:g}: {text}") for image, text in list(some)[:8]])
        head = ["guidance", "agreement", "diversity", "distance"]
        return Drawn(
            {"guidance": sheet(rows, self.title, size=128)},
            {f"{len(captions)} captions × {self.each} pictures": Table(head, numbers)},
        )

    def _diversity(self, embeddings: Tensor) -> float:
        groups = torch.nn.functional.normalize(embeddings, dim=1).unflatten(0, (-1, self.each))
        cosines = torch.einsum("gid,gjd->gij", groups, groups)
        pairs = ~torch.eye(self.each, dtype=torch.bool)
        return float(1 - cosines[:, pairs].mean())
