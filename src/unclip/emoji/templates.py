"""Find colors by palette pixels and concepts by templates in emoji scenes, without a network.

An object's color is the palette family that most of its pixels belong to. Its concept is the one
of the nearest crop among crops of real single objects. Both are right on the real renders, so an
image of two objects is right if its two halves show the stated objects in the stated places.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from unclip.emoji.catalog import BACKGROUNDS, COLORS, concepts

CONTRAST = 40.0  # of 255: least difference of a pixel's strongest channel from the background's
TOLERANCE = 32.0  # Euclidean distance of a pixel from a palette shade, in levels of 255
FEWEST = 20  # palette pixels of an object, at 64 px
CROP = 32  # side of a crop in pixels
_BATCH = 64
_LUMINANCE = torch.tensor([0.299, 0.587, 0.114])

Images = UInt8[Tensor, "count 3 size size"]
Regions = Bool[Tensor, "count size size"]
Scenes = Sequence[Mapping[str, Any]]  # metadata of images


def pairs(metadata: Scenes) -> list[int]:
    """Return the rows of scenes with two recolored objects in a relation."""
    return [
        row
        for row, scene in enumerate(metadata)
        if scene.get("relation") and all(item["colour"] for item in scene["objects"])
    ]


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


def everywhere(images: Images) -> Regions:
    """Return regions that cover the images."""
    return torch.ones_like(images[:, 0], dtype=torch.bool)


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
    """Crops of real single objects."""

    crops: Float[Tensor, "templates features"]  # descriptions of the crops, see `describe`
    concepts: list[str]  # OpenMoji code of the concept of each crop

    @classmethod
    def cut(cls, images: Images, metadata: Scenes, name: str) -> Self:
        """Take up to two crops of every concept of set `name` in every color.

        `images` are real images of one object.

        Raises:
            FileNotFoundError: a concept has no image.
        """
        cells: dict[tuple[str, str | None], list[int]] = {}
        for row, scene in enumerate(metadata):
            (item,) = scene["objects"]
            cells.setdefault((item["concept"], item["colour"]), []).append(row)
        shown = {code for code, _ in cells}
        if missing := [one.name for one in concepts(name) if one.hexcode not in shown]:
            names = ", ".join(missing)
            raise FileNotFoundError(f"no training image of one {names}: prepare a larger data set")
        rows = [row for cell in cells.values() for row in cell[:2]]
        codes = [metadata[row]["objects"][0]["concept"] for row in rows]
        return cls(describe(images[rows], everywhere(images[rows])), codes)

    def name(self, images: Images, regions: Regions) -> list[str]:
        """Return the code of the concept whose crop is nearest to each image's object."""
        nearest = torch.cdist(describe(images, regions), self.crops).argmin(dim=1)
        return [self.concepts[row] for row in nearest.tolist()]

    def verify(self, images: Images, regions: Regions, items: Scenes) -> Bool[Tensor, " count"]:
        """Return whether each region's object has the concept that its item states."""
        named = self.name(images, regions)
        pairs = zip(named, items, strict=True)
        return torch.tensor([code == item["concept"] for code, item in pairs])


def describe(images: Images, regions: Regions) -> Float[Tensor, "count features"]:
    """Describe the object in each region: its mask and, inside it, its mean-free luminance.

    The box of the foreground is resized to 32 × 32; its aspect ratio is not kept.
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


def verify_scenes(
    images: Images, metadata: Scenes, templates: Templates
) -> dict[str, Bool[Tensor, " count"]]:
    """Return which images show the objects that their metadata state.

    `colors`, `concepts` and `both` are about scenes with two recolored objects, `single` is about
    the concept of images of one object. A key without images is left out.
    """
    verified = {}
    if rows := pairs(metadata):
        scenes = [metadata[row] for row in rows]
        regions = halves([scene["relation"] for scene in scenes], images.shape[-1]).flatten(0, 1)
        twice = images[rows].repeat_interleave(2, dim=0)  # the first object, then the second
        items = [item for scene in scenes for item in scene["objects"]]
        stated = torch.tensor([list(COLORS).index(item["colour"]) for item in items])
        colors = (main_colors(twice, regions) == stated).unflatten(0, (-1, 2)).all(dim=1)
        named = templates.verify(twice, regions, items).unflatten(0, (-1, 2)).all(dim=1)
        verified = {"colors": colors, "concepts": named, "both": colors & named}
    if rows := [row for row, scene in enumerate(metadata) if len(scene.get("objects", ())) == 1]:
        items = [metadata[row]["objects"][0] for row in rows]
        verified["single"] = templates.verify(images[rows], everywhere(images[rows]), items)
    return verified


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
