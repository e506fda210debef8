"""Figures of the paper: variations, interpolations, text diffs and principal components."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from unclip.contact_sheet import Tile, contact_sheet
from unclip.emoji.prompts import caption_pairs
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.measurement import Measurement, Result
from unclip.evaluation.sources import Real


class Figure(Measurement):
    """A figure or table about images of seen compositions."""

    size: int = 256  # side of the images in pixels; the bundle's largest size if that is smaller
    batch_size: int = 8  # number of images sampled at a time

    stages = ("clip", "decoder")

    def size_in(self, context: Context) -> int:
        """Return the side of the images in pixels."""
        return min(self.size, context.cascade.size)

    def options(self, context: Context) -> dict[str, Any]:
        """Return the size, the batch size and the seed for a method of `Cascade`."""
        size = self.size_in(context)
        return {"size": size, "batch_size": self.batch_size, "seed": context.seed}

    def real(self, context: Context) -> Real:
        """Return real images of the figure's size."""
        return context.real(SEEN, self.size_in(context))

    def singles(self, context: Context, count: int) -> Real:
        """Return real images of one object; no object is repeated before all have appeared."""
        real, of_name = self.real(context), {}
        for row, scene in enumerate(real.metadata):
            if len(objects := scene.get("objects", [{"name": row}])) == 1:
                of_name.setdefault(objects[0]["name"], []).append(row)
        if not of_name:
            raise ValueError(f"{context.data} has no image of one object in {SEEN}")
        turns = sorted((turn, row) for rows in of_name.values() for turn, row in enumerate(rows))
        return real.take([row for _, row in turns[:count]])


def sheet(rows: Iterable[Sequence[Tile]], title: str, size: int = 160) -> Image.Image:
    """Draw rows of images with captions; all rows are as long as the first."""
    first, *others = rows
    tiles = [*first, *(tile for row in others for tile in row)]
    return contact_sheet(tiles, columns=len(first), size=size, title=title)


def tiles(images: Iterable[Tensor], captions: Iterable[str]) -> list[Tile]:
    """Return tiles of as many images as there are captions, or of all images if there are fewer."""
    return [Tile(image, caption) for image, caption in zip(images, captions, strict=False)]


class Sheet(Figure):
    """A contact sheet; each row shows edits of real images."""

    stem: ClassVar[str]
    note: ClassVar[str]
    tile: ClassVar[int] = 160  # side of an image on the sheet, in pixels

    def __call__(self, context: Context) -> Result:
        image = sheet(self.rows(context), self.title, self.tile)
        return Result(images={self.stem: image}, note=self.note)

    @abstractmethod
    def rows(self, context: Context) -> Iterator[list[Tile]]:
        """Yield the rows; all of them have the same length."""


class Variations(Sheet):
    """Real images, their reconstructions and their variations."""

    images: int
    count: int  # number of variations of each
    eta: float  # eta of DDIM, the share of noise that is sampled again

    title = "Variations (figure 3)"
    stem = "variations"
    note = (
        "Each row: a real image, the decoder's reconstruction, and variations with the same z_i, "
        "whose x_T comes from DDIM inversion and is partly sampled again. CLIP's embedding "
        "determines what stays the same and leaves open what changes."
    )

    def rows(self, context: Context) -> Iterator[list[Tile]]:
        real, options = self.singles(context, self.images), self.options(context)
        for image, caption in zip(real.images, real.captions, strict=True):
            varied = context.cascade.vary(image, self.count, eta=self.eta, **options)
            back = context.cascade.reconstruct([image], **options)
            made = [*back.images[options["size"]], *varied.images[options["size"]]]
            seeds = [f"seed {k}, eta {self.eta:g}" for k in range(self.count)]
            yield tiles([image, *made], [caption, "reconstruction", *seeds])


class Interpolation(Sheet):
    """Interpolations between two real images, with interpolated and with fixed noise."""

    pairs: int
    frames: int  # number of images per interpolation

    title = "Interpolation between two images (figure 4)"
    stem = "interpolation"
    tile = 128
    note = (
        "Each pair has two rows: slerp of both z_i and x_T, whose ends are the reconstructions; "
        "and slerp of z_i alone with one random x_T."
    )

    def rows(self, context: Context) -> Iterator[list[Tile]]:
        real, options = self.singles(context, 2 * self.pairs), self.options(context)
        shares = [k / (self.frames - 1) for k in range(self.frames)]
        for k in range(0, len(real) // 2 * 2, 2):
            start, end = real.images[k], real.images[k + 1]
            for noise in ("slerp", "fixed"):
                made = context.cascade.interpolate(start, end, self.frames, noise=noise, **options)
                names = [f"{share:.2f}, x_T {noise}" for share in shares]
                names = [real.captions[k], *names, real.captions[k + 1]]
                yield tiles([start, *made.images[options["size"]], end], names)


class TextDiffs(Sheet):
    """Text diffs applied to real images."""

    images: int
    strength: float  # last angle θ
    frames: int  # number of angles from 0 to `strength`

    title = "Text diffs (figure 5)"
    stem = "text_diffs"
    note = (
        "Each row: a real image, and its z_i rotated toward the difference of two captions with "
        "x_T unchanged. Rotated by 0 it is the reconstruction."
    )

    def rows(self, context: Context) -> Iterator[list[Tile]]:
        real, options = self.real(context), self.options(context)
        options |= {"strength": self.strength, "frames": self.frames}
        thetas = [self.strength * k / (self.frames - 1) for k in range(self.frames)]
        for pair in caption_pairs(real.metadata, self.images, seed=context.seed):
            image = real.images[pair.row]
            made = context.cascade.text_diff(image, pair.source, pair.target, **options)
            names = [pair.source, *(f"rotated by {theta:.2f}" for theta in thetas[:-1])]
            yield tiles([image, *made.images[options["size"]]], [*names, pair.target])


class Components(Sheet):
    """Reconstructions from the first principal components of the image embedding."""

    images: int
    dimensions: list[int]  # numbers of principal components that are kept

    title = "Reconstructions from principal components of z_i (figure 7)"
    stem = "components"
    note = (
        "Each row: images of one embedding reduced to its first principal components, all from the "
        "same noise; the real image comes last. The first components hold what matters most to "
        "CLIP."
    )

    def rows(self, context: Context) -> Iterator[list[Tile]]:
        examples = context.cascade.embed(list(context.real(SEEN).images))
        width = examples.shape[1]
        dimensions = [count for count in self.dimensions if count <= width]
        real, options = self.singles(context, self.images), self.options(context)
        for image, caption in zip(real.images, real.captions, strict=True):
            made = context.cascade.pca_reconstruct(image, dimensions, examples, **options)
            names = [*(f"{n} of {width}" for n in dimensions), caption]
            yield tiles([*made.images[options["size"]], image], names)
