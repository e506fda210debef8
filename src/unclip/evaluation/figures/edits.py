"""Variations, interpolations, text diffs and principal components (figures 3, 4, 5 and 7)."""

from dataclasses import dataclass
from typing import ClassVar

from unclip.contact_sheet import Tile
from unclip.emoji.caption_pairs import caption_pairs
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.figures.figure import Figure, sheet
from unclip.evaluation.measurement import Result


@dataclass(frozen=True, kw_only=True)
class Variations(Figure):
    """Variations of real images.

    Args:
        images: number of images.
        count: number of variations of each.
        eta: eta of DDIM, the share of noise that is sampled again.
    """

    images: int
    count: int
    eta: float

    title: ClassVar[str] = "Variations (figure 3)"

    def __call__(self, context: Context) -> Result:
        """Show each image, its reconstruction and its variations."""
        real, rows, cascade = self.singles(context, self.images), [], context.cascade
        options, size = self.options(context), self.size_in(context)
        for image, caption in zip(real.images, real.captions, strict=True):
            varied = cascade.vary(image, self.count, eta=self.eta, **options).images[size]
            back = cascade.reconstruct([image], **options).images[size][0]
            row = [Tile(image, caption), Tile(back, "reconstruction")]
            rows.append([*row, *(Tile(made, f"seed {k}") for k, made in enumerate(varied))])
        note = (
            "Each row: a real image, the decoder's reconstruction, and variations with the same "
            "z_i, whose x_T comes from DDIM inversion and is partly sampled again. CLIP's "
            "embedding determines what stays the same and leaves open what changes."
        )
        title = f"{self.title}, eta {self.eta:g}"
        return Result(images={"variations": sheet(rows, title)}, note=note)


@dataclass(frozen=True, kw_only=True)
class Interpolation(Figure):
    """Interpolation between two real images.

    Args:
        pairs: number of pairs.
        frames: number of images per interpolation.
    """

    pairs: int
    frames: int

    title: ClassVar[str] = "Interpolation between two images (figure 4)"

    def __call__(self, context: Context) -> Result:
        """Show each pair with interpolated and with fixed noise."""
        real, rows, size = self.singles(context, 2 * self.pairs), [], self.size_in(context)
        for first in range(0, len(real) // 2 * 2, 2):
            ends, names = real.images[first : first + 2], real.captions[first : first + 2]
            for noise in ("slerp", "fixed"):
                made = context.cascade.interpolate(
                    *ends, self.frames, noise=noise, **self.options(context)
                ).images[size]
                between = [
                    Tile(image, f"{k / (self.frames - 1):.2f}, x_T {noise}")
                    for k, image in enumerate(made)
                ]
                rows.append([Tile(ends[0], names[0]), *between, Tile(ends[1], names[1])])
        note = (
            "Each pair has two rows: slerp of both z_i and x_T, whose ends are the "
            "reconstructions; and slerp of z_i alone with one random x_T."
        )
        return Result(images={"interpolation": sheet(rows, self.title, size=128)}, note=note)


@dataclass(frozen=True, kw_only=True)
class TextDiffs(Figure):
    """Text diffs applied to real images.

    Args:
        images: number of images.
        strength: last angle θ.
        frames: number of angles from 0 to `strength`.
    """

    images: int
    strength: float
    frames: int

    title: ClassVar[str] = "Text diffs (figure 5)"

    def __call__(self, context: Context) -> Result:
        """Show each image and its embedding rotated step by step."""
        rows, real = [], self.real(context)
        for pair in caption_pairs(real.metadata, self.images, seed=context.seed):
            image = real.images[pair.row]
            made = context.cascade.text_diff(
                image,
                pair.source,
                pair.target,
                strength=self.strength,
                frames=self.frames,
                **self.options(context),
            ).images[self.size_in(context)]
            thetas = [self.strength * k / (self.frames - 1) for k in range(self.frames)]
            words = [*(f"rotated by {theta:.2f}" for theta in thetas[:-1]), pair.target]
            rows.append([Tile(image, pair.source), *map(Tile, made, words)])
        note = (
            "Each row: a real image, and its z_i rotated toward the difference of two captions "
            "with x_T unchanged. Rotated by 0 it is the reconstruction."
        )
        return Result(images={"text_diffs": sheet(rows, self.title)}, note=note)


@dataclass(frozen=True, kw_only=True)
class Components(Figure):
    """Reconstructions from the first principal components of the image embedding.

    Args:
        images: number of images.
        dimensions: numbers of principal components that are kept.
    """

    images: int
    dimensions: list[int]

    title: ClassVar[str] = "Reconstructions from principal components of z_i (figure 7)"

    def __call__(self, context: Context) -> Result:
        """Show each image reconstructed from more and more components."""
        cascade = context.cascade
        examples = cascade.embed(list(context.real(SEEN).images))
        dimensions = [count for count in self.dimensions if count <= examples.shape[1]]
        real, rows = self.singles(context, self.images), []
        for image, caption in zip(real.images, real.captions, strict=True):
            made = cascade.pca_reconstruct(
                image, dimensions, examples, **self.options(context)
            ).images[self.size_in(context)]
            row = [
                Tile(each, f"{n} of {examples.shape[1]}")
                for n, each in zip(dimensions, made, strict=True)
            ]
            rows.append([*row, Tile(image, caption)])
        note = (
            "Each row: images of one embedding reduced to its first principal components, all from "
            "the same noise; the real image comes last. The first components hold what matters "
            "most to CLIP."
        )
        return Result(images={"components": sheet(rows, self.title)}, note=note)
