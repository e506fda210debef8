"""Reconstruction by DDIM inversion, for several numbers of steps."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from unclip.contact_sheet import Tile
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.figures.figure import Figure, sheet
from unclip.evaluation.measurement import Result, Table
from unclip.evaluation.similarity import psnr


@dataclass(frozen=True, kw_only=True)
class Inversion(Figure):
    """Accuracy of reconstructing real images of 64 px from their latents.

    Args:
        images: number of images.
        steps: numbers of DDIM steps, the same in both directions.
        guidance: guidance scales of the decoder.
    """

    images: int
    steps: list[int]
    guidance: list[float]

    title: ClassVar[str] = "Reconstruction by DDIM inversion"

    def __call__(self, context: Context) -> Result:
        """Invert and reconstruct with each number of steps at each guidance scale."""
        cascade = context.cascade
        images = context.real(SEEN).images[: self.images]
        z, rows, tiles = cascade.embed(list(images)), [], []
        for scale in self.guidance:
            for steps in self.steps:
                options = {
                    "guidance_scale": scale,
                    "steps": {"decoder": steps},
                    "batch_size": self.batch_size,
                }
                latents = cascade.invert(list(images), **options)
                seeds = [0] * len(images)
                back = cascade.render(latents, seeds=seeds, size=64, **options).images[64]
                cosine = F.cosine_similarity(cascade.embed(list(back)), z).mean()
                numbers = [psnr(back, images).mean(), latents.noise.std(), cosine]
                rows.append([f"{scale:g}", steps, *map(float, numbers)])
                tiles.append([Tile(image, f"s {scale:g}, {steps} steps") for image in back[:8]])
        truth = [Tile(image, "real") for image in images[:8]]
        head = ["guidance", "steps", "PSNR, dB", "standard deviation of x_T", "cosine of z_i"]
        note = (
            "PSNR of the 64 px reconstruction, the standard deviation of x_T (1 for true noise), "
            "and the cosine between the CLIP embeddings of the reconstruction and the image."
        )
        return Result(
            tables={f"{len(images)} images": Table(head, rows)},
            images={"inversion": sheet([truth, *tiles], self.title, size=96)},
            note=note,
        )
