import pytest
import torch

from unclip.contact_sheet import Tile, _font, _wrap, contact_sheet


def flat(color: tuple[int, int, int], size: int = 64) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, size, size)


def test_a_sheet_has_the_size_of_its_rows_and_every_tile_in_its_place():
    colors = [(200, 10 * k, 30) for k in range(7)]
    tiles = [Tile(flat(color), f"image {k}") for k, color in enumerate(colors)]
    sheet = contact_sheet(tiles, columns=3, size=96, title="Seven")
    one_row, two_rows = (contact_sheet(tiles[:n], columns=3, size=96).height for n in (1, 4))
    row_height = two_rows - one_row
    top = contact_sheet(tiles[:1], columns=3, size=96, title="Seven").height - one_row + 8
    assert sheet.size == (3 * (96 + 8) + 8, top + 3 * row_height)
    for k, color in enumerate(colors):
        row, column = divmod(k, 3)
        center = (8 + column * 104 + 48, int(top + row * row_height + 48))
        assert sheet.getpixel(center) == color


def test_a_marked_tile_is_framed_and_captions_stay_inside():
    blue, black = flat((0, 0, 255)), flat((0, 0, 0))
    plain = contact_sheet([Tile(blue, "")], columns=1, size=64)
    marked = contact_sheet([Tile(blue, "", marked=True)], columns=1, size=64)
    assert plain.getpixel((7, 40)) == (255, 255, 255) != marked.getpixel((7, 40))
    assert plain.getpixel((40, 40)) == marked.getpixel((40, 40)) == (0, 0, 255)
    long = "an unusually long caption about very many things and then some more of it " * 3
    sheet = contact_sheet([Tile(black, long), Tile(black, "")], columns=2, size=96)
    second = sheet.crop((8 + 96 + 8, 8 + 96 + 1, sheet.width, sheet.height))
    assert second.getcolors() == [(second.width * second.height, (255, 255, 255))]
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], columns=2)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["w" * 100_000, "a few words that are wide " * 9, "i" * 90])
def test_a_long_text_is_cut_where_it_fits(text):
    font = _font(12)
    *_, last = lines = _wrap(text, font, 128, 2)
    assert len(lines) == 2 and last.endswith("…")
    assert all(font.getlength(line) <= 128 for line in lines)
    assert font.getlength(lines[0]) > 90  # the width is used
