"""The base class of the paper's figures and tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.choices import encode_images, encode_texts
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.measurement import Measurement
from unclip.evaluation.sources import Real


@dataclass(frozen=True, kw_only=True)
class Figure(Measurement):
    """A figure or table about images of seen compositions.

    Args:
        size: side of the images in pixels; the bundle's largest size if that is smaller.
        batch_size: number of images sampled at a time.
    """

    size: int = 256
    batch_size: int = 8

    stages: ClassVar[tuple[str, ...]] = ("clip", "decoder")

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
        """Return real images of one object; no object is repeated before all have appeared.

        Raises:
            ValueError: there is no such image.
        """
        real, rounds = self.real(context), {}
        seen: dict[Any, int] = {}
        for row, scene in enumerate(real.metadata):
            objects = scene.get("objects", [{"name": row}])
            if len(objects) == 1:
                name = objects[0]["name"]
                seen[name] = seen.get(name, 0) + 1
                rounds.setdefault(seen[name], []).append(row)
        rows = [row for number in sorted(rounds) for row in rounds[number]]
        if not rows:
            raise ValueError(f"{context.data} has no image of one object in {SEEN}")
        return real.take(rows[:count])


def judge_images(
    context: Context, images: UInt8[Tensor, "count 3 height width"]
) -> Float[Tensor, "count dim"]:
    """Return the judge's embeddings of images, of unit length."""
    return F.normalize(encode_images(context.judge, images), dim=-1)


def judge_texts(context: Context, texts: Sequence[str]) -> Float[Tensor, "count dim"]:
    """Return the judge's embeddings of texts, of unit length."""
    return F.normalize(encode_texts(context.judge, texts), dim=-1)


def sheet(rows: Sequence[Sequence[Tile]], title: str, size: int = 160) -> Image.Image:
    """Show rows of images with captions; all rows are as long as the first."""
    tiles = [tile for row in rows for tile in row]
    return contact_sheet(tiles, columns=len(rows[0]), size=size, title=title)
