"""Pictures with the boxes that a detector drew, for people to check what it says."""

from collections.abc import Sequence

from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unclip.contact_sheet import Tile, contact_sheet
from unclip.emoji import COLORS
from unclip.evaluation.detector import Detection
from unclip.evaluation.geneval import Composition, fault
from unclip.images import to_pil, to_tensor

_TILE = 144


def marked_sheet(
    images: UInt8[Tensor, "count 3 height width"],
    found: Sequence[Sequence[Detection]],
    compositions: Sequence[Composition],
    right: Bool[Tensor, " count"],
    *,
    most: int = 48,
    columns: int = 8,
) -> Image.Image:
    """Pictures evenly picked from all, with what was found in them and what is wrong.

    Args:
        images: the pictures.
        found: of each.
        compositions: what each should show.
        right: whether it does; the others are framed.
        most: pictures on the sheet.
        columns: of the sheet.
    """
    count = len(images)
    rows = (
        sorted({place * count // most for place in range(most)}) if count > most else range(count)
    )
    tiles = []
    for row in rows:
        wrong = fault(compositions[row], found[row])
        words = (
            compositions[row].prompt if wrong is None else f"{compositions[row].prompt}: {wrong}"
        )
        tiles.append(Tile(marked(images[row], found[row]), words, marked=wrong is not None))
    title = f"{int(right.sum())} of {count} are right. Framed: wrong, by what the detector found."
    return contact_sheet(tiles, columns=columns, size=_TILE, title=title, lines=3)


def marked(
    image: UInt8[Tensor, "3 height width"], found: Sequence[Detection]
) -> UInt8[Tensor, "3 size size"]:
    """A picture, enlarged, with each object's box in its color, its name and how sure it is."""
    picture = to_pil(image).resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(10)
    for one in found:
        box = [side * (_TILE - 1) for side in one.box]
        draw.rectangle(box, outline="black", width=3)
        draw.rectangle(box, outline=COLORS[one.color].body, width=1)
        place = (box[0] + 2, max(box[1] - 12, 0))
        words = f"{one.color} {one.name} {one.score:.2f}"
        draw.rectangle(draw.textbbox(place, words, font), fill="white")
        draw.text(place, words, "black", font)
    return to_tensor(picture)
