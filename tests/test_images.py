import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from unclip.images import ImageError, decode_image, open_image, open_mask, save_png, to_tensor

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def kind_of(content: bytes, **options) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(content, **options)
    return caught.value.kind


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """Insert a chunk after the header of a PNG."""
    return png[:33] + chunk(name, content) + png[33:]


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


@pytest.fixture
def image():
    """An asymmetric image, wider than high: the left half is red, the right half is blue."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste((0, 0, 255), (20, 0, 40, 20))
    return image


def test_a_path_a_pillow_image_and_a_tensor_give_the_same_image(image, tmp_path):
    image.save(tmp_path / "a.png")
    pixels = to_tensor(image)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), image, pixels, pixels[None]):
        assert torch.equal(to_tensor(open_image(given)), pixels)
    assert torch.equal(to_tensor(open_image(pixels.float() / 127.5 - 1)), pixels)


def test_images_of_all_modes_become_rgb(image):
    alpha = image.convert("RGBA")
    alpha.putalpha(0)
    for given, color in (
        (image.convert("L"), (76, 76, 76)),
        (image.convert("P", palette=Image.Palette.ADAPTIVE), RED),
        (alpha, WHITE),
        (torch.zeros(4, 8, 9, dtype=torch.uint8), WHITE),  # transparent
        (torch.zeros(8, 9), (128, 128, 128)),
    ):
        opened = open_image(given)
        assert opened.mode == "RGB" and opened.getpixel((0, 0)) == color
    assert opened.size == (9, 8)


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
    path, cut = tmp_path / "some.png", encoded(Image.new("RGB", (64, 64), "red"))[:60]
    for content, message in ((b"a text", r"some\.png: not an image"), (cut, r"some\.png")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_image(path)


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 4),
        ("GIF", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 4),
    ],
)
def test_the_content_decides_the_format(kind, options, tolerance, image, tmp_path):
    (tmp_path / "name.jpg").write_bytes(encoded(image, kind, **options))
    pixels = np.array(open_image(tmp_path / "name.jpg")).astype(int)
    assert np.abs(pixels - np.array(image)).max() <= tolerance


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_an_animation_gives_its_first_frame(kind, image):
    other = Image.new("RGB", image.size, "lime")
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(image, kind, save_all=True, append_images=[other], **options)
    red, green, blue = decode_image(content).getpixel((5, 5))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize(
    ("pixels", "kind", "gray"),
    [
        (np.full((8, 8), 32896, np.uint16), "PNG", 128),
        (np.full((8, 8), 32896, np.uint16), "TIFF", 128),
        (np.full((8, 8), 32896, np.int32), "TIFF", 128),
        (np.full((8, 8), 0.5, np.float32), "TIFF", 128),
        (np.full((8, 8), 128, np.float32), "TIFF", 128),
        (np.full((8, 8), np.nan, np.float32), "TIFF", 0),
    ],
)
def test_16_bits_and_floats_are_scaled(pixels, kind, gray):
    content = encoded(Image.fromarray(pixels), kind)
    assert decode_image(content).getpixel((3, 3)) == (gray, gray, gray)


def test_16_bit_colors_and_cmyk_are_read():
    rows = b"".join(b"\0" + struct.pack(">HHH", 65535, 0, 32896) * 2 for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    assert decode_image(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).getpixel((1, 1)) == (255, 0, 128)
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert decode_image(encoded(cmyk, "TIFF")).getpixel((3, 3)) == RED
    red, green, blue = decode_image(encoded(cmyk, "JPEG", quality=95)).getpixel((3, 3))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize(
    ("content", "kind", "detail"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(99), "other format", "HEIC: convert it with `heif-convert"),
        (b"\0\0\0\x18ftypmif1" + bytes(99), "other format", "HEIC"),
        (b"<?xml version='1.0'?>\n<!-- x --><svg xmlns=''/>", "other format", "SVG: .*rsvg-"),
        (b"\xef\xbb\xbf<!DOCTYPE svg [<!ENTITY a 'b'>]><svg>", "other format", "SVG"),
        (b"\xff\x0a" + bytes(99), "other format", "JPEG XL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image", "PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF"),
        (b"<html>404</html>", "not an image", "PNG"),
        (b"", "not an image", "PNG"),
    ],
)
def test_other_formats_are_named_with_a_way_to_convert_them(content, kind, detail):
    assert kind_of(content) == kind
    with pytest.raises(ImageError, match=detail):
        decode_image(content)


def test_the_error_of_an_image_crosses_processes():
    error = pickle.loads(pickle.dumps(ImageError("corrupt image", "cut off")))
    assert str(error) == "corrupt image: cut off" and error.kind == "corrupt image"


TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + b"\0" * 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone_once(kind, orientation, image):
    turns = [None, None, 0, 3, 1, 5, 4, 6, 2]  # Image.Transpose that makes the image upright
    inverse = {2: 4, 4: 2}.get(turns[orientation], turns[orientation])
    stored = image if inverse is None else image.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "TIFF":
        options["tiffinfo"] = TiffImagePlugin.ImageFileDirectory_v2()
        options["tiffinfo"][0x0112] = orientation
    else:
        options["exif"] = exif
    opened = decode_image(encoded(stored, kind, **options))
    assert opened.size == image.size
    assert np.abs(np.array(opened).astype(int) - np.array(image))[:, [3, -3]].max() < 40


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0" + b"\x00\x08\x00\x02\x01\x12\x00\x03" * 4,
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
        TURNED.replace(b"\x03\0\x01\0\0\0\x06", b"\x02\0\x05\0\0\0\xc8"),  # text for a number
        np.random.default_rng(0).bytes(300),
    ],
)
def test_broken_exif_data_is_ignored(exif, image):
    jpeg = with_exif(encoded(image, "JPEG", quality=95), exif)
    webp = encoded(image, "WEBP", lossless=True, exif=exif)
    png = with_chunk(encoded(image), b"eXIf", exif[6:])
    wrong_checksum = png[: 41 + len(exif) - 6] + b"abcd" + png[45 + len(exif) - 6 :]
    for content in (jpeg, webp, png, wrong_checksum):
        assert decode_image(content).size == (40, 20)


def test_a_large_or_broken_chunk_of_a_png_costs_no_pixel(image):
    large = zlib.compress(bytes(2**21))
    for name, content in (
        (b"zTXt", b"note\0\0" + large),
        (b"iTXt", b"note\0\1\0\0\0" + large),
        (b"iCCP", b"icc\0\0" + zlib.compress(np.random.default_rng(0).bytes(2**21))),
        (b"iCCP", b"no profile"),
        (b"pHYs", b""),
    ):
        opened = decode_image(with_chunk(encoded(image), name, content))
        assert opened.tobytes() == image.tobytes()


def test_an_image_keeps_no_metadata(image, tmp_path):
    for kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        content = encoded(image, kind, icc_profile=np.random.default_rng(0).bytes(100_000))
        for opened in (decode_image(content), open_image(Image.open(io.BytesIO(content)))):
            save_png(opened, tmp_path / "a.png")
            assert (tmp_path / "a.png").stat().st_size < 10_000


def test_size_limits_come_before_the_pixels():
    content = encoded(Image.new("1", (13000, 13000)))
    assert kind_of(content) == kind_of(content, max_pixels=13000**2 - 1) == "image too large"
    assert kind_of(encoded(Image.new("1", (64, 64))), max_pixels=4095) == "image too large"
    assert decode_image(encoded(Image.new("1", (64, 64))), max_pixels=4096).size == (64, 64)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_cut_images_are_corrupt(kind):
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
    for cut in (20, 33, len(whole) // 2):
        assert kind_of(whole[:cut]) == "corrupt image"


def test_a_mask_is_white_on_black_or_on_transparency(tmp_path):
    layer = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    layer.paste(WHITE, (0, 0, 4, 8))
    layer.save(tmp_path / "layer.png")
    plain = Image.new("L", (8, 8))
    plain.paste(255, (0, 0, 4, 8))
    expected = torch.arange(8).expand(8, 8) < 4
    for mask in (layer, plain, tmp_path / "layer.png", expected):
        assert torch.equal(open_mask(mask, (8, 8)), expected)
