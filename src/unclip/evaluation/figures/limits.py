"""Prompts that unCLIP finds hard: binding, writing, detail (figures 14 to 16)."""

from dataclasses import dataclass

from unclip.contact_sheet import Tile
from unclip.evaluation.figures.base import Drawn, Figure, Studio, sheet


@dataclass(frozen=True, kw_only=True)
class Limits(Figure):
    """Args: prompts: by what is hard about them; count: pictures of each."""

    prompts: dict[str, list[str]]
    count: int

    title = "Limits (figures 14 to 16)"
    about = (
        "Which color belongs to which object, how many there are and where is not well told by "
        "CLIP's embedding; letters are not, nor are small things in a picture of 64 px."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Draws it."""
        rows = []
        for kind, prompts in self.prompts.items():
            for prompt in prompts:
                seeds = range(studio.seed, studio.seed + self.count)
                made = studio.cascade.text_to_image(
                    [prompt] * self.count, seeds=seeds, **studio.how
                ).images[studio.size]
                rows.append([Tile(image, f"{kind}: {prompt}") for image in made])
        return Drawn({"limits": sheet(rows, self.title)})
