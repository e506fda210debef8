import math

import pytest
import torch
from random_weights import randomize

from unclip.networks.feature_maps import FeatureMap, FeatureMaps

D, CHANNELS, SIDE, RANK = 6, 5, 4, 3


@pytest.fixture
def feature_map():
    return randomize(FeatureMap(D, channels=CHANNELS, side=SIDE, rank=RANK), std=1)


def test_a_map_is_its_position_plus_weighted_basis_functions(feature_map):
    z = torch.randn(2, D)
    coefficients = feature_map.coefficients(z).view(2, RANK, CHANNELS)
    out = feature_map(z)
    assert out.shape == (2, CHANNELS, SIDE, SIDE)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for b, c, y, x in ((0, 0, 0, 0), (1, 4, 3, 2), (0, 2, 1, 3)):
        place = SIDE * y + x
        expected = feature_map.position_embedding[place, c]
        for r in range(RANK):
            expected = expected + coefficients[b, r, c] * feature_map.basis[place, r]
        torch.testing.assert_close(out[b, c, y, x], expected)


@torch.no_grad()
def test_a_channel_of_the_maps_of_many_embeddings_has_the_rank(feature_map):
    maps = feature_map(torch.randn(100, D))[:, 0].flatten(1)
    assert torch.linalg.matrix_rank(maps - maps.mean(dim=0), atol=1e-3) == RANK


@torch.no_grad()
def test_maps_start_small_and_without_positions():
    start = FeatureMap(384, channels=64, side=16, rank=8)
    assert (start.position_embedding == 0).all()
    std = start(torch.randn(32, 384)).std().item()
    assert std == pytest.approx(0.02 * math.sqrt(384), rel=0.15)


def test_each_level_has_a_map_of_its_own_size():
    sizes = {"channels": [4, 8, 16], "patch": 2, "hidden": 8, "rank": 2, "image_size": 32}
    maps = FeatureMaps(D, levels=[0, 2], **sizes)(torch.randn(3, D), torch.randn(3, D))
    shapes = {level: tuple(values.shape) for level, values in maps.items()}
    assert shapes == {0: (3, 4, 16, 16), 2: (3, 16, 4, 4)}


def test_a_map_depends_on_both_embeddings_and_is_not_linear_in_them():
    maps = FeatureMaps(D, channels=[4, 8], patch=2, levels=[1], hidden=8, rank=2, image_size=32)
    a, b, zero = torch.randn(1, D), torch.randn(1, D), torch.zeros(1, D)
    both, image, text, neither = (maps(*z)[1] for z in ((a, b), (a, zero), (zero, b), (zero, zero)))
    assert not torch.allclose(image, neither) and not torch.allclose(text, neither)
    assert not torch.allclose(both + neither, image + text, atol=1e-4)
