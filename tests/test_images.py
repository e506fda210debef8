import pytest
import torch
from PIL import Image

from unclip.images import open_image, to_tensor


@pytest.fixture
def image():
    """An asymmetric image, wider than high: the left half is red, the right half is blue."""
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    return image


def test_a_path_a_pillow_image_and_a_tensor_give_the_same_image(image, tmp_path):
    image.save(tmp_path / "a.png")
    pixels = to_tensor(image)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), image, pixels, pixels[None]):
        assert torch.equal(to_tensor(open_image(given)), pixels)
    assert torch.equal(to_tensor(open_image(pixels.float() / 127.5 - 1)), pixels)


def test_images_of_all_modes_become_rgb(image, tmp_path):
    gray = open_image(image.convert("L"))
    assert gray.mode == "RGB" and gray.getpixel((0, 0)) == (76, 76, 76)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    assert open_image(palette).getpixel((0, 0)) == (255, 0, 0)
    alpha = image.convert("RGBA")
    alpha.putalpha(0)
    assert open_image(alpha).getpixel((30, 10)) == (255, 255, 255)
    assert open_image(torch.zeros(8, 9)).size == (9, 8)
    transparent = torch.zeros(4, 8, 9, dtype=torch.uint8)
    assert open_image(transparent).getpixel((0, 0)) == (255, 255, 255)


def test_an_image_is_rotated_as_its_exif_orientation_says(image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    image.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 2)) == (255, 0, 0)
    assert upright.getpixel((10, 38)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"not \[2, 3, 8, 8\]"),
        (torch.zeros(5, 8, 8), r"not \[5, 8, 8\]"),
        (torch.full((3, 8, 8), 255.0), r"floats of an image"),
        (torch.full((3, 8, 8), float("nan")), r"floats of an image"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8 or float, not torch.int64"),
    ],
)
def test_tensors_that_are_not_images_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        open_image(given)


def test_files_that_are_not_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("a text")
    with pytest.raises(ValueError, match=r"text\.png is not an image file: use one of PNG"):
        open_image(tmp_path / "text.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cut\.png"):
        open_image(tmp_path / "cut.png")
