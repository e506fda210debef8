"""Variations, interpolations, text diffs and principal components (figures 3, 4, 5 and 7)."""

from dataclasses import dataclass

from unclip.contact_sheet import Tile
from unclip.evaluation.figures.base import Drawn, Figure, Studio, sheet
from unclip.evaluation.figures.differences import differences


@dataclass(frozen=True, kw_only=True)
class Variations(Figure):
    """Args: pictures: how many are varied; count: variations of each; eta: DDIM's."""

    pictures: int
    count: int
    eta: float

    title = "Variations (figure 3)"
    about = (
        "Each row: a real picture, the decoder's reconstruction of it, and variations: z_i kept, "
        "x_T found by DDIM inversion and partly drawn anew. What stays is what CLIP's embedding "
        "holds; what changes is what it leaves open."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Draws it."""
        real, rows = studio.singles(self.pictures), []
        for image, caption in zip(real.images, real.captions, strict=True):
            varied = studio.cascade.vary(
                image, self.count, eta=self.eta, seed=studio.seed, **studio.how
            )
            back = studio.cascade.reconstruct([image], seed=studio.seed, **studio.how)
            row = [Tile(image, caption), Tile(back.images[studio.size][0], "reconstruction")]
            row += [Tile(made, f"seed {k}") for k, made in enumerate(varied.images[studio.size])]
            rows.append(row)
        return Drawn({"variations": sheet(rows, f"{self.title}, eta {self.eta:g}")})


@dataclass(frozen=True, kw_only=True)
class Interpolation(Figure):
    """Args: pairs: how many; frames: pictures of each way."""

    pairs: int
    frames: int

    title = "Interpolation between two pictures (figure 4)"
    about = (
        "Each pair twice: slerp of both z_i and x_T, whose ends are the reconstructions; then of "
        "z_i alone, from one x_T drawn at random."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Draws it."""
        real, rows = studio.singles(2 * self.pairs), []
        for first in range(0, len(real) // 2 * 2, 2):
            ends, names = real.images[first : first + 2], real.captions[first : first + 2]
            for noise in ("slerp", "fixed"):
                made = studio.cascade.interpolate(
                    *ends, self.frames, noise=noise, seed=studio.seed, **studio.how
                ).images[studio.size]
                between = [
                    Tile(image, f"{k / (self.frames - 1):.2f}, x_T {noise}")
                    for k, image in enumerate(made)
                ]
                rows.append([Tile(ends[0], names[0]), *between, Tile(ends[1], names[1])])
        return Drawn({"interpolation": sheet(rows, self.title, size=128)})


@dataclass(frozen=True, kw_only=True)
class TextDiffs(Figure):
    """Args: pictures: how many; strength: the last θ; frames: pictures from 0 to it."""

    pictures: int
    strength: float
    frames: int

    title = "Text diffs (figure 5)"
    about = (
        "Each row: a real picture; z_i turned towards the difference of two captions, x_T kept. "
        "Turned by 0 it is the reconstruction."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Draws it."""
        rows, real = [], studio.real()
        for change in differences(real.metadata, self.pictures, seed=studio.seed):
            made = studio.cascade.text_diff(
                real.images[change.row],
                change.source,
                change.target,
                strength=self.strength,
                frames=self.frames,
                seed=studio.seed,
                **studio.how,
            ).images[studio.size]
            thetas = [self.strength * k / (self.frames - 1) for k in range(self.frames)]
            words = [*(f"turned by {theta:.2f}" for theta in thetas[:-1]), change.target]
            row = [Tile(real.images[change.row], change.source), *map(Tile, made, words)]
            rows.append(row)
        return Drawn({"text_diffs": sheet(rows, self.title)})


@dataclass(frozen=True, kw_only=True)
class Components(Figure):
    """Args: pictures: how many; dimensions: how many principal components are kept."""

    pictures: int
    dimensions: list[int]

    title = "Reconstructions from the first principal components of z_i (figure 7)"
    about = (
        "Each row: pictures of a real picture's embedding cut to its first principal components, "
        "all from the same noise; the real picture is last. The first components hold what matters "
        "most to CLIP."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Draws it."""
        examples = studio.cascade.embed(list(studio.real(64).images))
        dimensions = [count for count in self.dimensions if count <= examples.shape[1]]
        real, rows = studio.singles(self.pictures), []
        for image, caption in zip(real.images, real.captions, strict=True):
            made = studio.cascade.pca_reconstruct(
                image, dimensions, examples, seed=studio.seed, **studio.how
            ).images[studio.size]
            row = [
                Tile(each, f"{n} of {examples.shape[1]}")
                for n, each in zip(dimensions, made, strict=True)
            ]
            rows.append([*row, Tile(image, caption)])
        return Drawn({"components": sheet(rows, self.title)})
