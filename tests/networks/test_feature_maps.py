import math

import torch

from unclip.networks.feature_maps import FeatureMap, FeatureMaps

D, CHANNELS, SIDE, RANK = 6, 5, 4, 3


def feature_map() -> FeatureMap:
    made = FeatureMap(D, channels=CHANNELS, side=SIDE, rank=RANK)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_a_map_is_its_position_plus_weighted_basis_functions():
    made, z = feature_map(), torch.randn(2, D)
    coefficients = made.coefficients(z).view(2, RANK, CHANNELS)
    out = made(z)
    assert out.shape == (2, CHANNELS, SIDE, SIDE)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for b, c, y, x in ((0, 0, 0, 0), (1, 4, 3, 2), (0, 2, 1, 3)):
        place = SIDE * y + x
        total = made.position_embedding[place, c]
        for r in range(RANK):
            total = total + coefficients[b, r, c] * made.basis[place, r]
        torch.testing.assert_close(out[b, c, y, x], total)


def test_a_channel_of_a_map_has_the_rank():
    """Of many embeddings' maps of one channel, as vectors over positions."""
    made = feature_map()
    with torch.no_grad():
        maps = made(torch.randn(100, D))[:, 0].flatten(1)
        spread = torch.linalg.matrix_rank(maps - maps.mean(dim=0), atol=1e-3)
    assert spread == RANK


def test_maps_start_small_without_positions():
    made = FeatureMap(384, channels=64, side=16, rank=8)
    assert (made.position_embedding == 0).all()
    with torch.no_grad():
        out = made(torch.randn(32, 384))
    assert abs(out.std().item() / (0.02 * math.sqrt(384)) - 1) < 0.15


def test_each_level_has_a_map_of_its_own_size():
    maps = FeatureMaps(
        D, channels=[4, 8, 16], patch=2, levels=[0, 2], hidden=8, rank=2, image_size=32
    )
    made = maps(torch.randn(3, D), torch.randn(3, D))
    assert {level: tuple(m.shape) for level, m in made.items()} == {
        0: (3, 4, 16, 16),
        2: (3, 16, 4, 4),
    }
    for a, b in ((1, 0), (0, 1)):  # either embedding alone changes every map
        z = a * torch.ones(1, D), b * torch.ones(1, D)
        nothing = maps(torch.zeros(1, D), torch.zeros(1, D))
        assert all(not torch.allclose(m, nothing[level]) for level, m in maps(*z).items())


def test_the_maps_are_not_linear_in_the_embeddings():
    maps = FeatureMaps(D, channels=[4, 8], patch=2, levels=[1], hidden=8, rank=2, image_size=32)
    a, b, zero = torch.randn(1, D), torch.randn(1, D), torch.zeros(1, D)
    both, first, second, nothing = (
        maps(*z)[1] for z in ((a, b), (a, zero), (zero, b), (zero, zero))
    )
    assert not torch.allclose(both + nothing, first + second, atol=1e-4)
