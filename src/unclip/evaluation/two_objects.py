"""Network-free probes of emoji scenes: colors by palette pixels, concepts by templates.

An object's color is the palette family that most of its pixels belong to. Its concept is the one
of the nearest crop among crops of real single objects. Both are right on the real renders, so an
image of two objects is right if its two halves show the stated objects in the stated places.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from unclip.emoji import BACKGROUNDS, COLORS, concepts
from unclip.evaluation.emoji_probes import concept_set
from unclip.evaluation.measures import Numbers, share
from unclip.evaluation.real import Real, read_real

CONTRAST = 40.0  # of 255: how far a pixel's strongest channel is from the background's
TOLERANCE = 32.0  # Euclidean distance of a pixel from a palette shade, in levels of 255
FEWEST = 20  # palette pixels of an object, at 64 px
CROP = 32  # side of a crop in pixels
SINGLES = 100  # training images read for each concept
_BATCH = 64
_LUMINANCE = torch.tensor([0.299, 0.587, 0.114])

Images = UInt8[Tensor, "count 3 size size"]
Regions = Bool[Tensor, "count size size"]


def pairs(metadata: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the rows of scenes with two recolored objects in a relation."""
    return [
        row
        for row, scene in enumerate(metadata)
        if scene.get("relation") and all(item["colour"] for item in scene["objects"])
    ]


def read_singles(root: str | Path) -> Real:
    """Load 64 px training images of one object from a folder of emoji scenes.

    Raises:
        FileNotFoundError: the folder has no emoji scenes.
    """
    if (name := concept_set(root)) is None:
        raise FileNotFoundError(f"{root} holds no emoji scenes")
    real = read_real(root, "train", 64, count=SINGLES * len(concepts(name)))
    return real.take([row for row, scene in enumerate(real.metadata) if len(scene["objects"]) == 1])


def background(images: Images) -> Float[Tensor, "count 3"]:
    """Return each image's background: the median color of its border."""
    rows, columns = images[:, :, [0, -1]], images[:, :, 1:-1, [0, -1]]
    return torch.cat([rows.flatten(2), columns.flatten(2)], dim=2).float().median(dim=2).values


def background_names(images: Images) -> list[str]:
    """Return the name of the known background nearest to each image's."""
    known = torch.tensor([_rgb(shade) for shade in BACKGROUNDS.values()])
    nearest = torch.cdist(background(images), known).argmin(dim=1)
    return [list(BACKGROUNDS)[row] for row in nearest.tolist()]


def foreground(images: Images) -> Regions:
    """Return true where an image, slightly smoothed, differs from its background."""
    difference = images.float() - background(images)[:, :, None, None]
    smoothed = (difference + F.avg_pool2d(difference, 3, stride=1, padding=1)) / 2
    return smoothed.abs().amax(dim=1) > CONTRAST


def halves(relations: Sequence[str], size: int) -> Bool[Tensor, "count 2 size size"]:
    """Return the regions of a pair's first and second object: left and right, or top and bottom."""
    first = torch.arange(size) < size // 2
    left = torch.stack([first, ~first])[:, None].expand(2, size, size)
    sides = {"left of": left, "above": left.transpose(1, 2)}
    return torch.stack([sides[relation] for relation in relations])


def main_colors(images: Images, regions: Regions) -> Int64[Tensor, " count"]:
    """Return the index in COLORS of the color of most palette pixels; -1 if there are too few."""
    found = []
    shades = torch.tensor([[_rgb(one.body), _rgb(one.detail)] for one in COLORS.values()])
    for batch, region in zip(images.split(_BATCH), regions.split(_BATCH), strict=True):
        pixels = batch.float().movedim(1, -1).flatten(1, 2)  # (N, HW, 3)
        distance = torch.cdist(pixels, shades.flatten(0, 1))  # (N, HW, 2 · colors)
        near, color = distance.unflatten(2, (-1, 2)).amin(dim=3).min(dim=2)  # (N, HW)
        counted = (region & foreground(batch)).flatten(1) & (near <= TOLERANCE)
        counts = (F.one_hot(color, len(shades)) * counted[..., None]).sum(dim=1)
        most, index = counts.max(dim=1)
        found.append(torch.where(most >= FEWEST, index, -1))
    return torch.cat(found)


class Templates(NamedTuple):
    """Crops of real single objects.

    Attributes:
        crops: descriptions of the crops, see `describe`.
        concepts: OpenMoji code of the concept of each crop.
    """

    crops: Float[Tensor, "templates features"]
    concepts: list[str]

    @classmethod
    def cut(cls, singles: Real, name: str, *, each: int = 2) -> Self:
        """Take at most `each` crops of every concept of set `name` in every color.

        Raises:
            FileNotFoundError: a concept has no image.
        """
        cells: dict[tuple[str, str | None], list[int]] = {}
        for row, scene in enumerate(singles.metadata):
            (item,) = scene["objects"]
            cells.setdefault((item["concept"], item["colour"]), []).append(row)
        shown = {code for code, _ in cells}
        if missing := [one.name for one in concepts(name) if one.hexcode not in shown]:
            names = ", ".join(missing)
            raise FileNotFoundError(f"no training image of one {names}: prepare a larger data set")
        rows = [row for cell in cells.values() for row in cell[:each]]
        codes = [code for (code, _), cell in cells.items() for _ in cell[:each]]
        images = singles.images[rows]
        return cls(describe(images, everywhere(images)), codes)

    def name(self, images: Images, regions: Regions) -> list[str]:
        """Return the code of the concept whose crop is nearest to each image's object."""
        nearest = torch.cdist(describe(images, regions), self.crops).argmin(dim=1)
        return [self.concepts[row] for row in nearest.tolist()]


def everywhere(images: Images) -> Regions:
    """Return regions that cover the images."""
    return torch.ones_like(images[:, 0], dtype=torch.bool)


def describe(images: Images, regions: Regions) -> Float[Tensor, "count features"]:
    """Describe the object in each region: its mask and, inside it, its mean-free luminance.

    The box of the foreground is scaled to 32 × 32, whatever its proportions.
    """
    described = []
    for batch, region in zip(images.split(_BATCH), regions.split(_BATCH), strict=True):
        mask = foreground(batch) & region
        luminance = torch.einsum("nchw,c->nhw", batch.float() / 255, _LUMINANCE)
        layers = torch.stack([mask.float(), luminance * mask], dim=1)  # (N, 2, H, W)
        grid = F.affine_grid(_boxes(mask), [len(batch), 2, CROP, CROP], align_corners=False)
        inside, light = F.grid_sample(layers, grid, align_corners=False).flatten(2).unbind(dim=1)
        mean = light.sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True).clamp(min=1e-6)
        described.append(torch.cat([inside, light - inside * mean], dim=1))
    return torch.cat(described)


def measure_scenes(shown: Real, templates: Templates) -> dict[str, Numbers]:
    """Measure how many images show the objects that their metadata state.

    `colors`, `concepts` and `both` are shares of scenes with two recolored objects, `single` is the
    share of images of one object whose concept is right. A share without images is left out.
    """
    images, metadata, shares = shown.images, shown.metadata, {}
    if rows := pairs(metadata):
        scenes = [metadata[row] for row in rows]
        regions = halves([scene["relation"] for scene in scenes], images.shape[-1]).flatten(0, 1)
        twice = images[rows].repeat_interleave(2, dim=0)  # the first object, then the second
        items = [item for scene in scenes for item in scene["objects"]]
        stated = torch.tensor([list(COLORS).index(item["colour"]) for item in items])
        colors = (main_colors(twice, regions) == stated).unflatten(0, (-1, 2)).all(dim=1)
        named = _named(templates, twice, regions, items).unflatten(0, (-1, 2)).all(dim=1)
        shares = {"colors": colors, "concepts": named, "both": colors & named}
    if rows := [row for row, scene in enumerate(metadata) if len(scene["objects"]) == 1]:
        items = [metadata[row]["objects"][0] for row in rows]
        shares["single"] = _named(templates, images[rows], everywhere(images[rows]), items)
    return {name: share(right) for name, right in shares.items()}


def _named(
    templates: Templates, images: Images, regions: Regions, items: Sequence[Mapping[str, Any]]
) -> Bool[Tensor, " count"]:
    """Return whether the templates name the stated concept of each region's object."""
    named = templates.name(images, regions)
    return torch.tensor([code == item["concept"] for code, item in zip(named, items, strict=True)])


def _boxes(mask: Regions) -> Float[Tensor, "count 2 3"]:
    """Return the affine maps from a crop to the box of each mask; an empty mask has no box."""
    maps = torch.zeros(len(mask), 2, 3)
    for axis, filled in enumerate((mask.any(dim=1), mask.any(dim=2))):  # columns, rows
        size = filled.shape[1]
        low = filled.float().argmax(dim=1)
        high = size - filled.flip(1).float().argmax(dim=1)
        maps[:, axis, axis] = (high - low) / size
        maps[:, axis, 2] = (high + low) / size - 1
    return maps


def _rgb(shade: str) -> list[float]:
    return [float(int(shade[start : start + 2], 16)) for start in (1, 3, 5)]
