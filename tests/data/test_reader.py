import numpy as np
import pytest
import torch
from make_shards import encoded, flat_image
from PIL import Image

from unclip.data.bad_samples import BadSample
from unclip.data.reader import decode_captions, decode_image, decode_metadata, find_image
from unclip.images import fit, to_tensor


def kind_of(function, *args, **options) -> str:
    with pytest.raises(BadSample) as caught:
        function(*args, **options)
    return caught.value.kind


WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "color", "transparent", "expected"),
    [
        ("L", 90, None, (90, 90, 90)),
        ("P", (200, 20, 40), None, (200, 20, 40)),
        ("P", (200, 20, 40), 0, WHITE),
        ("RGB", (1, 2, 3), (1, 2, 3), WHITE),
        ("RGBA", (200, 0, 0, 51), None, (244, 204, 204)),  # 0.2 of red over white
        ("RGBA", (200, 10, 30, 255), None, (200, 10, 30)),
        ("LA", (0, 0), None, WHITE),
        ("1", 1, None, WHITE),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode, color, transparent, expected):
    image = Image.new(mode, (16, 16), color)  # of a palette: the color becomes its first entry
    options = {} if transparent is None else {"transparency": transparent}
    assert decode_image(encoded(image, **options)).getpixel((3, 3)) == expected


def test_images_out_of_range_are_bad():
    assert kind_of(decode_image, flat_image(0, 1)) == "image too small"
    thin = encoded(Image.new("RGB", (400, 15)))
    assert kind_of(decode_image, thin) == "image too small"
    assert decode_image(thin, minimum_size=15).size == (400, 15)
    assert kind_of(decode_image, encoded(Image.new("1", (8000, 4001)))) == "image too large"
    assert kind_of(decode_image, b"no image at all") == "not an image"
    assert kind_of(decode_image, flat_image(0)[:60]) == "corrupt image"


def test_fit_takes_the_middle_square():
    image = Image.new("RGB", (300, 100), "blue")
    image.paste("red", (100, 0, 200, 100))
    for one in (image, image.transpose(Image.Transpose.ROTATE_90)):
        pixels = np.array(fit(one, 20))
        assert pixels.shape == (20, 20, 3)
        assert np.abs(pixels[2:-2, 2:-2].astype(int) - (255, 0, 0)).max() <= 2
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


def captions_of(members):
    return decode_captions(members, decode_metadata(members))


@pytest.mark.parametrize(
    ("json_member", "text", "expected"),
    [
        (b'{"captions": [" a dog ", "", "a cat"]}', None, ["a dog", "a cat"]),
        (b'{"caption": "a dog"}', b"other", ["a dog"]),
        (b'{"text": "a dog"}', b"other", ["a dog"]),
        (b'{"width": 3}', "ein Hündchen\n".encode(), ["ein Hündchen"]),
        (None, b"a dog\r\na cat\n", ["a dog", "a cat"]),
        (None, "a\u2028dog\x85\n".encode(), ["a dog"]),
        (None, b"\xef\xbb\xbfa dog", ["a dog"]),
        (None, "a dog".encode("utf-16"), ["a dog"]),
        (b'\xef\xbb\xbf{"caption": "a dog"}', None, ["a dog"]),
        (b'{"caption": "A dog.\\nIt sits\\r\\n down. "}', None, ["A dog. It sits down."]),
        (b'{"captions": null, "caption": "a dog"}', None, ["a dog"]),
        (b'{"captions": [], "caption": "a dog"}', b"other", ["a dog"]),
        (b'{"captions": ["a dog", null]}', b"other", ["a dog"]),
        (b'{"caption": null}', b"a dog", ["a dog"]),
        (b'{"caption": 5}', b"five", ["five"]),
        (b'["a dog", "a cat"]', b"other", ["a dog", "a cat"]),
        (b"[]", b"a dog", ["a dog"]),
        (b'{"caption": "cut \\ud83d"}', None, ["cut \ufffd"]),
        (b'{"caption": "a \\u0000dog"}', None, ["a dog"]),
        (b'{"caption": "a dog"}', b"caf\xe9", ["a dog"]),
        (b'{"caption": "' + b"a" * 20_000 + b'"}', None, ["a" * 2000]),
    ],
)
def test_captions_are_read(json_member, text, expected):
    assert captions_of({"json": json_member, "txt": text}) == expected


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({}, "missing caption"),
        ({"json": b"{}"}, "missing caption"),
        ({"json": b'{"caption": null}'}, "missing caption"),
        ({"json": b'{"captions": ["", "  "]}'}, "empty captions"),
        ({"json": b'{"caption": null}', "txt": b" \n"}, "empty captions"),
        ({"json": b'{"captions": []}'}, "empty captions"),
        ({"txt": b"caf\xe9"}, "bad text"),
        ({"txt": b"a\0b"}, "bad text"),
        ({"txt": b"\xff\xfe\xfa"}, "bad text"),
        ({"json": b'{"captions": [1, 2]}'}, "bad caption"),
        ({"json": b'{"captions": {"a": "b"}}'}, "bad caption"),
        ({"json": b'{"captions": ["a dog"'}, "bad json"),
        ({"json": b"\xff\xfe\xfa"}, "bad json"),
        ({"json": b"[" * 200_000}, "bad json"),
        ({"json": b'{"captions": "x", "n": ' + b"9" * 9999 + b"}"}, "bad json"),
    ],
)
def test_captions_that_cannot_be_used_are_bad_samples(members, kind):
    assert kind_of(captions_of, members) == kind


def test_the_first_image_of_a_sample_is_found():
    assert find_image({"json": b"", "webp": b"w", "jpg": b"j"}) == b"j"
    assert kind_of(find_image, {"json": b"", "png": None}) == "missing image"
