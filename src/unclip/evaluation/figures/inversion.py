"""How exactly a picture comes back from its latents, by steps and iterations."""

from dataclasses import dataclass

import torch.nn.functional as F

from unclip.contact_sheet import Tile
from unclip.evaluation.figures.base import Drawn, Figure, Studio, Table, sheet
from unclip.evaluation.similarity import psnr


@dataclass(frozen=True, kw_only=True)
class Inversion(Figure):
    """Args: pictures: how many; steps: of DDIM, each way; guidance: scales of the decoder."""

    pictures: int
    steps: list[int]
    guidance: list[float]

    title = "Reconstruction by DDIM inversion"
    about = (
        "PSNR of the 64 px reconstruction, the deviation of x_T (of true noise it is 1), and the "
        "cosine of the reconstruction's CLIP embedding to the picture's own."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Measures it."""
        real = studio.real(64)
        images = real.images[: self.pictures]
        z, rows, tiles = studio.cascade.embed(list(images)), [], []
        for scale in self.guidance:
            for steps in self.steps:
                how = {
                    "guidance_scale": scale,
                    "steps": {"decoder": steps},
                    "batch_size": studio.batch_size,
                }
                latents = studio.cascade.invert(list(images), **how)
                made = studio.cascade.render(latents, seeds=[0] * len(images), size=64, **how)
                back = made.images[64]
                like = F.cosine_similarity(studio.cascade.embed(list(back)), z).mean()
                ratio = psnr(back, images).mean()
                spread = float(latents.noise.std())
                rows.append([f"{scale:g}", steps, float(ratio), spread, float(like)])
                tiles.append([Tile(image, f"s {scale:g}, {steps} steps") for image in back[:8]])
        truth = [Tile(image, "real") for image in images[:8]]
        head = ["guidance", "steps each way", "PSNR, dB", "deviation of x_T", "cosine"]
        shown = sheet([truth, *tiles], self.title, size=96)
        return Drawn({"inversion": shown}, {f"{len(images)} pictures": Table(head, rows)})
