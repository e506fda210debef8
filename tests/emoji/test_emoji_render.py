"""Rendered pixels agree with the scenes."""

import io
from itertools import combinations

import numpy as np
import pytest
from many_scenes import scenes_of
from PIL import Image, ImageColor

from unclip import emoji
from unclip.emoji.render import area, artwork, items_svg, place, recolor, scene_png
from unclip.emoji.scenes import CANVAS, Item, Scene, scenes

resvg_py = pytest.importorskip("resvg_py")
BY_NAME = {concept.name: concept for concept in emoji.concepts("M")}


def _pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _alone(item, size):
    """Render the alpha channel of one item without its scene."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{items_svg([item])}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return _pixels(bytes(png))[..., 3]


@pytest.mark.parametrize("split", ["train", "test_held_out"])
def test_boxes_and_areas_match_the_pixels(split):
    size = 288
    unit = size / CANVAS
    items = [item for scene in scenes_of("S", split, 16, seed=1) for item in scene.items]
    for item in items[:20]:
        ink = _alone(item, size) >= 128
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        x, y, width, height = place(item).box
        expected = np.array([x, y, x + width, y + height]) * unit
        assert np.abs(seen - expected).max() <= 2.5, item  # pixels of 288: under 1%
        assert min(x, y) >= 0 and max(x + width, y + height) <= CANVAS
        assert max(width, height) == pytest.approx(item.extent)
        assert area(item) * unit**2 == pytest.approx(ink.sum(), rel=0.06)


def test_sizes_are_renders_of_the_same_scene():
    (scene,) = scenes("S", seed=0, split="train", index=0)
    small, large = (_pixels(scene_png(scene, size)) for size in (64, 256))
    assert small.shape == (64, 64, 4) and large.shape == (256, 256, 4)
    assert (small[..., 3] == 255).all()
    shrunk = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BOX))
    assert np.abs(shrunk.astype(int) - small.astype(int)).mean() < 3
    assert len(set(large[:, :, :3].reshape(-1, 3)[::7].sum(axis=1))) > 10  # not enlarged


@pytest.mark.parametrize("name", [concept.name for concept in emoji.concepts("S")])
def test_the_main_shade_becomes_the_requested_color(name):
    concept = BY_NAME[name]
    for color in emoji.COLORS:
        item = Item(concept, color, 36, 36, 58, 0)
        pixels = _pixels(scene_png(Scene("", 0, "recoloured", (item,), None, "white", False), 64))
        body = ImageColor.getrgb(emoji.COLORS[color].body)
        share = (pixels[..., :3] == body).all(axis=-1).sum() / (area(item) * (64 / CANVAS) ** 2)
        assert share > 0.25, (name, color)


def test_without_a_color_the_drawing_is_unchanged():
    art = artwork(BY_NAME["apple"])
    assert recolor(art, None) == art.body
    assert recolor(art, "blue") != art.body
    assert art.shades[0] in emoji.COLORS["red"].palette


@pytest.mark.parametrize("background", list(emoji.BACKGROUNDS))
def test_every_color_stands_out_from_every_other_background(background):
    plain = np.array(ImageColor.getrgb(emoji.BACKGROUNDS[background]))
    for color, shades in emoji.COLORS.items():
        if color != background:
            assert np.abs(np.array(ImageColor.getrgb(shades.body)) - plain).max() >= 45, color


def test_backgrounds_and_colors_are_plainly_distinct():
    for shades in (emoji.BACKGROUNDS.values(), [color.body for color in emoji.COLORS.values()]):
        for first, second in combinations(map(ImageColor.getrgb, shades), 2):
            assert np.linalg.norm(np.subtract(first, second)) >= 40
