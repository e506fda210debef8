"""A small detector of objects, their boxes and their colors: anchor-free, one point an object.

Centres are peaks of a heatmap a class (CenterNet, Zhou et al. 2019); a box is its four distances
from a cell (FCOS, Tian et al. 2019). For pictures in which objects hardly overlap.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


class Heads(NamedTuple):
    """What the network says of each cell.

    Attributes:
        centre: logits that an object of a class has its centre here, `B classes h w`.
        sides: distances to the left, upper, right and lower side in shares of the picture,
            `B 4 h w`.
        color: logits of the color of the object here, `B colors h w`.
    """

    centre: Tensor
    sides: Tensor
    color: Tensor


class Peaks(NamedTuple):
    """The best centres of each picture, the surest first.

    Attributes:
        score: in [0, 1], `B most`.
        label: the class, `B most`.
        box: left, upper, right and lower side in [0, 1], `B most 4`.
        color: `B most`.
    """

    score: Float[Tensor, "batch most"]
    label: Int[Tensor, "batch most"]
    box: Float[Tensor, "batch most 4"]
    color: Int[Tensor, "batch most"]


class Detector(nn.Module):
    """A U-shaped network on cells of `patch` × `patch` pixels, with three heads.

    Args:
        classes: of objects.
        colors: of objects.
        width: channels of the finest level; the two below have twice and four times as many.
        patch: pixels of a cell's side. The picture's side is a multiple of four cells.
    """

    def __init__(self, *, classes: int, colors: int, width: int = 48, patch: int = 4):
        super().__init__()
        self.patch = patch
        self.stem = _convolution(3 * patch**2, width)
        self.fine = Residual(width)
        self.down = nn.Sequential(_convolution(width, 2 * width, stride=2), Residual(2 * width))
        self.deep = nn.Sequential(
            _convolution(2 * width, 4 * width, stride=2), Residual(4 * width), Residual(4 * width)
        )
        self.from_deep = nn.Conv2d(4 * width, 2 * width, 1)
        self.middle = Residual(2 * width)
        self.from_middle = nn.Conv2d(2 * width, width, 1)
        self.last = nn.Sequential(Residual(width), _convolution(width, 2 * width))
        self.centre = nn.Conv2d(2 * width, classes, 1)
        self.sides = nn.Conv2d(2 * width, 4, 1)
        self.color = nn.Conv2d(2 * width, colors, 1)
        nn.init.constant_(self.centre.bias, -4.0)  # nearly all cells are no centre
        nn.init.constant_(self.sides.bias, -1.5)

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Heads:
        """What it says of pictures in [-1, 1]."""
        cells = F.pixel_unshuffle(image, self.patch)  # (B, 3·patch², h, w)
        fine = self.fine(self.stem(cells))  # (B, W, h, w)
        middle = self.down(fine)  # (B, 2W, h/2, w/2)
        deep = self.from_deep(self.deep(middle))  # (B, 2W, h/4, w/4)
        middle = self.middle(middle + _enlarged(deep))
        last = self.last(fine + _enlarged(self.from_middle(middle)))  # (B, 2W, h, w)
        return Heads(self.centre(last), self.sides(last).sigmoid(), self.color(last))


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(
            _convolution(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        )
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch width h w"]:
        """Adds the branch."""
        return F.silu(x + self.norm(self.branch(x)))


def cell_centres(rows: int, columns: int) -> Float[Tensor, "rows columns 2"]:
    """The place (x, y) of each cell's middle, in [0, 1]."""
    y = (torch.arange(rows) + 0.5) / rows
    x = (torch.arange(columns) + 0.5) / columns
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def boxes_of(sides: Float[Tensor, "batch 4 h w"]) -> Float[Tensor, "batch h w 4"]:
    """Each cell's box as left, upper, right and lower side."""
    middle = cell_centres(*sides.shape[-2:]).to(sides)
    distances = rearrange(sides, "b side h w -> b h w side")
    return torch.cat([middle - distances[..., :2], middle + distances[..., 2:]], dim=-1)


def find_peaks(heads: Heads, most: int = 16) -> Peaks:
    """The cells whose surest class is surer than every class of every neighbour.

    So an object has one class, and neither a second box nor a second class beside the first.

    Args:
        heads: of the network.
        most: objects of a picture; what is no peak has score 0.
    """
    logit, label = heads.centre.max(dim=1)  # (B, h, w)
    highest = F.max_pool2d(logit[:, None], 3, stride=1, padding=1)[:, 0]
    score = torch.where(logit == highest, logit.sigmoid(), 0.0).flatten(1)
    score, place = score.topk(min(most, score.shape[1]), dim=1)  # (B, most)
    box = boxes_of(heads.sides).flatten(1, 2).clamp(0, 1)
    return Peaks(
        score,
        label.flatten(1).gather(1, place),
        box.gather(1, place[..., None].expand(-1, -1, 4)),
        heads.color.argmax(dim=1).flatten(1).gather(1, place),
    )


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.SiLU(),
    )


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
