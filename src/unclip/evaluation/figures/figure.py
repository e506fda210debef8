"""The base class of the paper's figures and tables."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.features import Features, Images
from unclip.evaluation.measurement import Measurement
from unclip.evaluation.networks import encode_images, encode_texts
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


def judged_cosines(
    context: Context, images: Images, texts: Sequence[str]
) -> Float[Tensor, "images texts"]:
    """Return the judge's cosine of each image to each text."""
    return unit(encode_images(context.judge, images)) @ unit(encode_texts(context.judge, texts)).T


def unit(embeddings: Features) -> Features:
    """Scale embeddings to unit length."""
    return F.normalize(embeddings, dim=-1)


def sheet(rows: Iterable[Sequence[Tile]], title: str, size: int = 160) -> Image.Image:
    """Draw rows of images with captions; all rows are as long as the first."""
    first, *others = rows
    tiles = [*first, *(tile for row in others for tile in row)]
    return contact_sheet(tiles, columns=len(first), size=size, title=title)


def tiles(images: Iterable[Tensor], captions: Iterable[str]) -> list[Tile]:
    """Return tiles of as many images as there are captions, or of all images if there are fewer."""
    return [Tile(image, caption) for image, caption in zip(images, captions, strict=False)]
