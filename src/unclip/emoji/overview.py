"""A contact sheet: every color of some concepts, then training scenes with their captions."""

import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

from unclip.emoji.captions import captions
from unclip.emoji.catalogue import BACKGROUNDS, COLORS, concepts
from unclip.emoji.render import scene_png
from unclip.emoji.scene_shards import scenes_of
from unclip.emoji.scenes import Item, Scene
from unclip.files import atomic_write

CELL, PICTURE, TEXT = 72, 128, 68  # pixels: a coloured object, a scene, the caption below it
COLUMNS, MOST_CONCEPTS, SCENES = 10, 64, 40


def write_sheet(path: Path, concept_set: str, seed: int) -> None:
    """Write the contact sheet of a concept set as a PNG."""
    colors = _color_table(concept_set)
    scenes = _scene_table(concept_set, seed)
    sheet = Image.new(
        "RGB", (max(colors.width, scenes.width), colors.height + scenes.height + 16), "white"
    )
    sheet.paste(colors, (0, 0))
    sheet.paste(scenes, (0, colors.height + 16))
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def _color_table(concept_set: str) -> Image.Image:
    rows = concepts(concept_set)[:MOST_CONCEPTS]
    halves = 2
    per_half = -(-len(rows) // halves)
    width = CELL * (1 + len(COLORS)) + 8
    table = Image.new("RGB", (halves * width, per_half * CELL), "white")
    backgrounds = list(BACKGROUNDS)
    for number, concept in enumerate(rows):
        left, top = number // per_half * width, number % per_half * CELL
        for column, color in enumerate([None, *COLORS] if concept.families else [None]):
            background = backgrounds[(number + column) % len(backgrounds)]
            item = Item(concept, color, 36, 36, 58, 0)
            scene = Scene("", 0, "single", (item,), None, background, False)
            table.paste(_picture(scene, CELL), (left + column * CELL, top))
    return table


def _scene_table(concept_set: str, seed: int) -> Image.Image:
    shown = list(scenes_of(concept_set, seed, "train", range(SCENES)))[:SCENES]
    rows = -(-len(shown) // COLUMNS)
    table = Image.new("RGB", (COLUMNS * (PICTURE + 4), rows * (PICTURE + TEXT)), "white")
    draw = ImageDraw.Draw(table)
    for number, scene in enumerate(shown):
        left, top = number % COLUMNS * (PICTURE + 4), number // COLUMNS * (PICTURE + TEXT)
        table.paste(_picture(scene, PICTURE), (left, top))
        caption = captions(scene, seed=seed)[number % 5]
        draw.text((left, top + PICTURE + 2), textwrap.fill(caption, 21), fill="black")
    return table


def _picture(scene: Scene, size: int) -> Image.Image:
    return Image.open(io.BytesIO(scene_png(scene, size))).convert("RGB")
