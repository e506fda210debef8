import json
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from make_shards import encoded, flat_image
from PIL import Image, PngImagePlugin

from unclip.data import reader
from unclip.data.bad_samples import BadSample
from unclip.data.reader import decode_captions, decode_image, decode_metadata, find_image
from unclip.images import fit, to_tensor


def kind_of(function, *args, **options) -> str:
    with pytest.raises(BadSample) as caught:
        function(*args, **options)
    return caught.value.kind


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with a few compressed zeros."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", start), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --------------------------------------------------------------------------------------- images
@pytest.mark.parametrize(
    ("extension", "kind", "options", "tolerance"),
    [
        ("png", "PNG", {}, 0),
        ("webp", "WEBP", {"lossless": True}, 0),
        ("jpg", "JPEG", {"quality": 95}, 4),
        ("jpeg", "JPEG", {"quality": 95}, 4),
    ],
)
def test_every_format_is_decoded(extension, kind, options, tolerance):
    pixels = np.array(decode_image(flat_image(200, 20, kind=kind, **options), extension))
    assert pixels.shape == (20, 20, 3)
    assert np.abs(pixels.astype(int) - (200, 0, 7)).max() <= tolerance


def uniform(mode: str, color) -> Image.Image:
    return Image.new(mode, (16, 16), color)


PALETTE = uniform("RGB", (200, 20, 40)).convert("P", palette=Image.Palette.ADAPTIVE)
WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (uniform("L", 90), {}, (90, 90, 90)),
        (PALETTE, {}, (200, 20, 40)),
        (PALETTE, {"transparency": 0}, WHITE),
        (uniform("RGB", (1, 2, 3)), {"transparency": (1, 2, 3)}, WHITE),
        (uniform("RGBA", (200, 0, 0, 51)), {}, (244, 204, 204)),  # 0.2 of red over white
        (uniform("RGBA", (200, 10, 30, 255)), {}, (200, 10, 30)),
        (uniform("LA", (0, 0)), {}, WHITE),
        (uniform("1", 1), {}, WHITE),
        (Image.fromarray(np.full((16, 16), 32896, np.uint16)), {}, (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb_on_white(image, options, expected):
    assert decode_image(encoded(image, **options), "png").getpixel((3, 3)) == expected


def test_a_cmyk_jpeg_becomes_rgb():
    content = encoded(uniform("CMYK", (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = decode_image(content, "jpg").getpixel((3, 3))
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize(("extension", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_exif_rotation_is_undone(extension, kind):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    upright = decode_image(encoded(image, kind, exif=exif), extension)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 3))[1] < 40 < 200 < upright.getpixel((10, 30))[1]


def test_size_limits_come_before_the_pixels(monkeypatch):
    assert kind_of(decode_image, png_header(30000, 30000), "png") == "image too large"
    assert kind_of(decode_image, png_header(13000, 13000), "png") == "image too large"
    assert kind_of(decode_image, png_header(6000, 6000), "png") == "image too large"
    assert kind_of(decode_image, png_header(4000, 4000), "png") == "corrupt image"
    monkeypatch.setattr(reader, "MAX_IMAGE_PIXELS", 4096)
    decode_image(flat_image(0, 64), "png")
    monkeypatch.setattr(reader, "MAX_IMAGE_PIXELS", 4095)
    assert kind_of(decode_image, flat_image(0, 64), "png") == "image too large"
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4095)  # a lower limit of Pillow's applies
    assert kind_of(decode_image, flat_image(0, 64), "png") == "image too large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kind_of(decode_image, png_header(30000, 30000), "png") == "image too large"


def test_tiny_images_are_bad():
    assert kind_of(decode_image, flat_image(0, 1), "png") == "image too small"
    thin = encoded(Image.new("RGB", (400, 15)))
    assert kind_of(decode_image, thin, "png") == "image too small"
    assert decode_image(thin, "png", minimum_size=15).size == (400, 15)


def test_broken_images_are_bad():
    noise = Image.effect_noise((64, 64), 50).convert("RGB")
    for kind, extension in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        whole = encoded(noise, kind)
        for cut in (0, 1, 10, 33, len(whole) // 2):
            assert kind_of(decode_image, whole[:cut], extension) == "corrupt image"
    assert kind_of(decode_image, b"no image at all", "jpg") == "corrupt image"
    damaged = bytearray(encoded(noise))
    damaged[60:90] = bytes(30)
    assert kind_of(decode_image, bytes(damaged), "png") == "corrupt image"


def test_format_must_be_the_named_one():
    assert kind_of(decode_image, flat_image(0, kind="BMP"), "png") == "corrupt image"
    assert kind_of(decode_image, flat_image(0, kind="GIF"), "jpg") == "corrupt image"
    assert kind_of(decode_image, flat_image(0), "webp") == "corrupt image"
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n"
    assert kind_of(decode_image, script, "png") == "corrupt image"


def test_compressed_text_in_a_png_is_no_bomb():
    notes = PngImagePlugin.PngInfo()
    notes.add_text("comment", "x" * 80_000_000, zip=True)
    content = encoded(Image.new("RGB", (16, 16)), pnginfo=notes)
    assert len(content) < 2**20
    assert kind_of(decode_image, content, "png") == "corrupt image"


# ----------------------------------------------------------------------------------------- fitting
def test_fit_takes_the_middle_square():
    image = Image.new("RGB", (300, 100), "blue")
    image.paste("red", (100, 0, 200, 100))
    pixels = np.array(fit(image, 20))
    assert pixels.shape == (20, 20, 3)
    assert np.abs(pixels[:, 2:-2].astype(int) - (255, 0, 0)).max() <= 2
    tall = fit(image.transpose(Image.Transpose.ROTATE_90), 20)
    assert np.abs(np.array(tall)[2:-2].astype(int) - (255, 0, 0)).max() <= 2
    assert fit(image, 200).size == (200, 200)


def test_fit_is_antialiased_and_leaves_the_right_size_alone():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # the finest stripes average to gray; picking pixels would not
    small = np.array(fit(Image.fromarray(stripes), 32)).astype(int)
    assert np.abs(small - 127.5).max() < 3
    image = Image.fromarray(stripes)
    assert fit(image, 256) is image
    tensor = to_tensor(image)
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
    assert torch.equal(tensor, torch.from_numpy(stripes.transpose(2, 0, 1).copy()))


# ---------------------------------------------------------------------------------------- captions
def test_captions_come_from_json_or_text():
    def both(members):
        return decode_captions(members, decode_metadata(members))

    assert both({"json": b'{"captions": [" a dog ", "", "a cat"]}'}) == ["a dog", "a cat"]
    assert both({"json": b'{"caption": "a dog"}', "txt": b"other"}) == ["a dog"]
    assert both({"json": b'{"width": 3}', "txt": "ein Hündchen\n".encode()}) == ["ein Hündchen"]
    assert both({"txt": b"a dog"}) == ["a dog"]


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({}, "missing caption"),
        ({"json": b"{}"}, "missing caption"),
        ({"json": b'{"captions": []}'}, "empty captions"),
        ({"json": b'{"captions": ["", "  "]}'}, "empty captions"),
        ({"txt": b" \n"}, "empty captions"),
        ({"txt": b"\xff\xfe\xfa"}, "bad text"),
        ({"json": b'{"captions": [1, 2]}'}, "bad json"),
        ({"json": b'{"captions": {"a": "b"}}'}, "bad json"),
        ({"json": b'{"captions": ["a dog"'}, "bad json"),
        ({"json": b"[1]"}, "bad json"),
        ({"json": b"\xff\xfe\xfa"}, "bad json"),
        ({"json": b"[" * 200_000}, "bad json"),
        (
            {"json": json.dumps({"captions": ["x"], "n": 1}).replace("1", "9" * 9999).encode()},
            "bad json",
        ),
    ],
)
def test_captions_that_cannot_be_used_are_bad_samples(members, kind):
    assert kind_of(lambda: decode_captions(members, decode_metadata(members))) == kind


def test_the_first_image_of_a_sample_is_found():
    assert find_image({"json": b"", "webp": b"w", "jpg": b"j"}) == ("jpg", b"j")
    assert kind_of(find_image, {"json": b"", "png": None}) == "missing image"
