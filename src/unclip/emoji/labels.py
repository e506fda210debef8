"""Where the objects of a scene are: the labels of a decoder's layout loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from unclip.batch import UNKNOWN_LABEL
from unclip.emoji.catalog import COLORS, SETS, concepts


@dataclass(frozen=True)
class LayoutLabels:
    """Turn the json member of a scene into two maps of labels, of concepts and of colors.

    In the first map, a cell in an object's box has the number of the concept in the catalog, and
    any other cell 0. In the second map, 1 is the object's own color, and 2, 3, … are those of
    `COLORS`. If the json member does not describe a scene, all cells are UNKNOWN_LABEL.

    Args:
        side: number of rows and columns of cells.
    """

    side: int

    def __call__(self, metadata: Mapping[str, Any]) -> Int64[Tensor, "2 side side"]:
        """Return the labels of a scene, whose boxes are x, y, width, height in [0, 1]."""
        try:
            return self._labels(metadata["objects"])
        except (LookupError, TypeError, ValueError):
            return torch.full((2, self.side, self.side), UNKNOWN_LABEL)

    def _labels(self, objects: Sequence[Mapping[str, Any]]) -> Tensor:
        labels = torch.zeros(2, self.side, self.side, dtype=torch.int64)
        centers = (torch.arange(self.side) + 0.5) / self.side
        numbers = {concept.hexcode: concept.number for concept in concepts(SETS[-1])}
        colors = [None, *COLORS]
        for thing in objects:
            x, y, width, height = thing["box"]
            rows = (centers > y) & (centers < y + height)
            columns = (centers > x) & (centers < x + width)
            inside = rows[:, None] & columns
            labels[0, inside] = numbers[thing["concept"]]
            labels[1, inside] = 1 + colors.index(thing["colour"])
        return labels
