"""What a figure is, and what it is drawn with."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from unclip.cascade import Cascade
from unclip.clip import ClipEmbedder
from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.networks import load_judge
from unclip.evaluation.real import Real, read_real


class Table(NamedTuple):
    """Numbers with their names."""

    head: list[str]
    rows: list[list[str | float]]


class Drawn(NamedTuple):
    """What came of a figure.

    Attributes:
        sheets: pictures by their names.
        tables: tables by their titles.
        remark: what has to be said of it.
    """

    sheets: dict[str, Image.Image]
    tables: Mapping[str, Table] = MappingProxyType({})
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Studio:
    """A bundle and real pictures.

    Args:
        cascade: the bundle.
        data: a data set's root.
        split: of the real pictures.
        size: of pictures shown, 64, 256 or 1024.
        seed: of all that is drawn.
        batch_size: pictures at a time.
    """

    cascade: Cascade
    data: Path
    split: str
    size: int
    seed: int
    batch_size: int
    _read: dict[int, Real] = field(default_factory=dict, repr=False, init=False)

    def real(self, size: int | None = None) -> Real:
        """The real pictures at a size, that of pictures shown unless said otherwise."""
        size = self.size if size is None else size
        if size not in self._read:
            self._read[size] = read_real(self.data, self.split, size)
        return self._read[size]

    def singles(self, count: int) -> Real:
        """Real pictures of one object each, no object twice before all had their turn."""
        real, rounds = self.real(), {}
        seen: dict[Any, int] = {}
        for row, scene in enumerate(real.metadata):
            objects = scene.get("objects", [{"name": row}])
            if len(objects) == 1:
                name = objects[0]["name"]
                seen[name] = seen.get(name, 0) + 1
                rounds.setdefault(seen[name], []).append(row)
        rows = [row for turn in sorted(rounds) for row in rounds[turn]]
        if not rows:
            raise ValueError(f"{self.data} has no picture of one object in {self.split}")
        return real.take(rows[:count])

    @property
    def how(self) -> dict[str, Any]:
        """Size and batch size, as the cascade's methods take them."""
        return {"size": self.size, "batch_size": self.batch_size}

    @cached_property
    def judge(self) -> ClipEmbedder:
        """A CLIP that no other stage has seen.

        Raises:
            FileNotFoundError: the bundle has none.
            ValueError: it is damaged, or the bundle's own CLIP.
        """
        return load_judge(self.cascade.folder, self.cascade.embedder)

    def judged(self, images: UInt8[Tensor, "count 3 height width"]) -> Float[Tensor, "count dim"]:
        """The judge's embeddings of pictures, of unit length, on the CPU."""
        parts = [self.judge.image(part).cpu() for part in images.split(64)]
        return F.normalize(torch.cat(parts), dim=-1)

    def judged_texts(self, texts: Sequence[str]) -> Float[Tensor, "count dim"]:
        """The judge's embeddings of texts, of unit length, on the CPU."""
        return F.normalize(self.judge.text(texts).text_embedding.cpu(), dim=-1)


class Figure(ABC):
    """One figure or table.

    Attributes:
        title: its name, and where the paper has it.
        about: how to read it.
    """

    title: str
    about: str

    @abstractmethod
    def __call__(self, studio: Studio) -> Drawn:
        """Draws it."""


def sheet(rows: Sequence[Sequence[Tile]], title: str, size: int = 160) -> Image.Image:
    """Rows of pictures with captions; all rows are as long as the first."""
    tiles = [tile for row in rows for tile in row]
    return contact_sheet(tiles, columns=len(rows[0]), size=size, title=title)
