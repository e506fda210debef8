"""Draw contact sheets: images in a grid with their captions below them."""

from bisect import bisect_right
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
    tiles: Sequence[Tile],
    *,
    columns: int,
    size: int = 128,
    title: str = "",
    lines: int = 2,
) -> Image.Image:
    """Draw tiles row by row, each resized to `size` pixels, with its caption wrapped below it.

    Args:
        tiles: one tile or more.
        columns: images per row.
        size: side of an image on the sheet, in pixels.
        title: title above the grid; none if empty.
        lines: lines reserved for each caption; a longer one ends in an ellipsis.

    Raises:
        ValueError: there is no tile, or an image is not [3, height, width].
    """
    if not tiles:
        raise ValueError("a contact sheet needs at least one image")
    font = _font(min(max(size // 11, 10), 16))
    line = sum(font.getmetrics()) + 1
    top, row_height = 18 + _GAP if title else 0, size + lines * line + _GAP
    width, rows = columns * (size + _GAP) + _GAP, -(-len(tiles) // columns)
    sheet = Image.new("RGB", (width, top + rows * row_height + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        title_font = _font(15)
        words = _wrap(title, title_font, width - 2 * _GAP, 1)[0]
        draw.text((_GAP, _GAP), words, _INK, title_font)
    for index, tile in enumerate(tiles):
        if tile.image.ndim != 3 or tile.image.shape[0] != 3:
            raise ValueError(f"an image is [3, height, width], not {list(tile.image.shape)}")
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
    wrapped, words = [""], text.split()
    while words:
        longer = f"{wrapped[-1]} {words[0]}".strip()
        if not wrapped[-1] or font.getlength(longer) <= width:
            wrapped[-1] = longer
            words.pop(0)
        elif len(wrapped) < lines:
            wrapped.append("")
        else:
            wrapped[-1] += " …"
            break
    return [_shorten(line, font, width) for line in wrapped]


def _shorten(line: str, font: FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.rstrip("… ")
    fits = range(1, len(line) + 1)  # a search by halves, since measuring a long line is slow
    kept = bisect_right(fits, width, key=lambda count: font.getlength(line[:count] + "…"))
    return line[:kept].rstrip() + "…"
