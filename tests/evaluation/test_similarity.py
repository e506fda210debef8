import math

import pytest
import torch

from unclip.evaluation.similarity import psnr, ssim
from unclip.images import bicubic, to_float, to_uint8


def test_bytes_are_rounded_and_clamped_never_wrapped():
    values = torch.tensor([-1.02, -1.0, -0.004, 0.004, 1.0, 1.004, 7.0])
    image = values.repeat(3, 1)[None, :, None]
    assert to_uint8(image)[0, 0, 0].tolist() == [0, 0, 127, 128, 255, 255, 255]


def test_bytes_survive_the_way_to_floats_and_back():
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats = to_float(image)
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(to_uint8(floats), image)


@pytest.mark.parametrize(
    "image", [torch.full((1, 3, 2, 2), torch.nan), torch.zeros(1, 3, 2, 2).byte()]
)
def test_what_has_no_bytes_is_refused(image):
    with pytest.raises(ValueError):
        to_uint8(image)


def test_psnr_is_each_images_own():
    """20 log10(255 / d) where every pixel is off by d; a batch's mean error would say otherwise."""
    target = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    image = target.clone()
    image[0] += 1
    image[1] += 50
    expected = [20 * math.log10(255), 20 * math.log10(255 / 50), 100.0]
    torch.testing.assert_close(psnr(image, target), torch.tensor(expected))


def test_ssim_of_flat_images_is_its_luminance_term():
    """(2ab + c) / (a² + b² + c), c = 0.01²: without variance nothing else is left."""
    first = torch.full((2, 3, 32, 32), 51, dtype=torch.uint8)
    second = torch.full((2, 3, 32, 32), 204, dtype=torch.uint8)
    second[1] = 51
    a, b, c = 0.2, 0.8, 0.01**2
    expected = torch.tensor([(2 * a * b + c) / (a**2 + b**2 + c), 1.0])
    torch.testing.assert_close(ssim(first, second), expected, atol=1e-4, rtol=0)


def test_one_image_alone_keeps_its_batch_dimension():
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert psnr(image, image).shape == ssim(image, image).shape == (1,)


def test_bicubic_keeps_flat_colors_and_antialiases():
    flat = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    assert torch.equal(bicubic(flat, 16), torch.full((1, 3, 16, 16), 200, dtype=torch.uint8))
    assert torch.equal(bicubic(flat, 256), torch.full((1, 3, 256, 256), 200, dtype=torch.uint8))
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    inner = bicubic(stripes, 16)[..., 2:-2]
    assert inner.float().sub(127.5).abs().max() < 10


def test_the_bicubic_baseline_is_what_an_upsampler_starts_from():
    low_res = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    enlarged = torch.nn.functional.interpolate(to_float(low_res), scale_factor=4.0, mode="bicubic")
    assert torch.equal(bicubic(low_res, 64), to_uint8(enlarged))


def test_unlike_shapes_are_refused():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one shape"):
        psnr(image, image[..., :4])
