"""Draw contact sheets: images in a grid with their captions below them."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple, cast

from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont
from torch import Tensor

from unclip.images import to_pil

_PAPER, _INK, _MARK = "white", "#222222", "#d2460a"
_GAP = 8  # pixels between tiles


class Tile(NamedTuple):
    """An image of a sheet, with its caption; a marked one has a colored frame and caption."""

    image: UInt8[Tensor, "3 height width"]
    caption: str
    marked: bool = False


def contact_sheet(
    tiles: Sequence[Tile], *, columns: int, size: int = 128, title: str = "", lines: int = 2
) -> Image.Image:
    """Draw tiles row by row, each resized to `size` pixels, with its caption wrapped below it.

    A caption that is longer than `lines` ends in an ellipsis. Without tiles, raise ValueError.
    """
    if not tiles:
        raise ValueError("a contact sheet needs at least one image")
    font = _font(min(max(size // 11, 10), 16))
    line = sum(font.getmetrics()) + 1
    top, row_height = 18 + _GAP if title else 0, size + lines * line + _GAP
    width, rows = columns * (size + _GAP) + _GAP, -(-len(tiles) // columns)
    sheet = Image.new("RGB", (width, top + rows * row_height + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for words in _wrap(title, _font(15), width - 2 * _GAP, 1):
        draw.text((_GAP, _GAP), words, _INK, _font(15))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        x, y = _GAP + column * (size + _GAP), top + _GAP + row * row_height
        image = to_pil(tile.image).resize((size, size), Image.Resampling.LANCZOS)
        sheet.paste(image, (x, y))
        if tile.marked:
            draw.rectangle((x - 3, y - 3, x + size + 2, y + size + 2), outline=_MARK, width=3)
        color = _MARK if tile.marked else _INK
        for number, words in enumerate(_wrap(tile.caption, font, size, lines)):
            draw.text((x, y + size + 2 + number * line), words, color, font)
    return sheet


def _font(size: int) -> FreeTypeFont:
    return cast(FreeTypeFont, ImageFont.load_default(size))  # with a size, it is always one


def _wrap(text: str, font: FreeTypeFont, width: int, lines: int) -> list[str]:
    """Break a text into at most `lines` lines of `width` pixels, ending in an ellipsis if cut."""
    text = text[: width * lines]  # no more letters fit; measuring a long text is slow
    for letters in range(width // 3, 2, -1):
        wrapped = textwrap.wrap(text, letters, max_lines=lines, placeholder="…")
        if all(font.getlength(line) <= width for line in wrapped):
            return wrapped
    return []
