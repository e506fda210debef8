import math

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from unclip.latents import slerp, spherical_mean, text_difference


def unit(*shape):
    z = torch.randn(*shape)
    return z / z.norm()


def angle(a, b):
    a, b = (point.double().flatten() / point.double().norm() for point in (a, b))
    return 2 * math.atan2((a - b).norm(), (a + b).norm())


class TestSlerp:
    @pytest.mark.parametrize("dim", [3, 128, 12288])
    def test_it_agrees_with_scipy(self, dim):
        a, b = unit(dim), unit(dim)
        at = np.linspace(0, 1, 7)
        a64, b64 = (point.double().numpy() for point in (a, b))
        ends = a64 / np.linalg.norm(a64), b64 / np.linalg.norm(b64)
        expected = geometric_slerp(*ends, at)
        ours = torch.stack([slerp(a, b, fraction) for fraction in at])
        torch.testing.assert_close(ours, torch.from_numpy(expected).float())

    def test_lengths_are_interpolated(self):
        point = slerp(3 * unit(64), 5 * unit(64), 0.25)
        assert point.norm().item() == pytest.approx(3.5, abs=1e-5)

    def test_the_ends_are_kept_to_the_bit(self):
        for _ in range(20):
            a, b = torch.randn(2, 3, 64, 64)
            assert torch.equal(slerp(a, b, 0.0), a)
            torch.testing.assert_close(slerp(a, b, 1.0), b)

    @pytest.mark.parametrize("away", [0.0, 1e-12, 1e-8, 1e-6, 1e-3])
    def test_between_close_points_it_is_the_middle(self, away):
        a = unit(64)
        b = a + away * unit(64)
        point = slerp(a, b, 0.5)
        assert point.isfinite().all()
        torch.testing.assert_close(point, (a + b) / 2, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("away", [0.0, 1e-12, 1e-8, 1e-4])
    def test_between_opposite_points_it_follows_one_great_circle(self, away):
        a = unit(64)
        b = -a + away * unit(64)
        for fraction in (0.0, 0.25, 0.5, 0.75, 1.0):
            point = slerp(a, b, fraction)
            assert point.norm().item() == pytest.approx(1, abs=1e-4)
            assert angle(a, point) == pytest.approx(fraction * math.pi, abs=1e-3)
        assert torch.equal(slerp(a, b, 0.5), slerp(a, b, 0.5))

    @pytest.mark.parametrize("broken", [torch.zeros(4), torch.full((4,), float("nan"))])
    def test_a_point_without_direction_is_refused(self, broken):
        with pytest.raises(ValueError, match="has no direction"):
            slerp(unit(4), broken, 0.5)


class TestSphericalMean:
    @pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_of_two_points_it_is_slerp(self, fraction):
        points = torch.stack([2 * unit(32), unit(32)])
        mixed = spherical_mean(points, [1 - fraction, fraction])
        torch.testing.assert_close(mixed, slerp(*points, fraction))

    def test_of_three_corners_it_is_their_middle_or_the_one_with_all_the_weight(self):
        middle = spherical_mean(torch.eye(3), [1, 1, 1])
        torch.testing.assert_close(middle, torch.full((3,), 1 / math.sqrt(3)))
        points = torch.randn(3, 2, 4)
        torch.testing.assert_close(spherical_mean(points, [0, 7, 0]), points[1])

    def test_no_other_point_has_smaller_squared_angles(self):
        points, weights = torch.stack([unit(5) + torch.ones(5) for _ in range(4)]), [1, 2, 3, 0.5]

        def cost(z):
            return sum(w * angle(z, p) ** 2 for w, p in zip(weights, points, strict=True))

        mean = spherical_mean(points, weights)
        assert all(cost(mean) < cost(mean + 0.01 * torch.randn(5)) for _ in range(100))

    @pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")]])
    def test_invalid_weights_are_refused(self, weights):
        with pytest.raises(ValueError, match="give one for each of 2 points"):
            spherical_mean(torch.randn(2, 4), weights)


def test_a_text_difference_is_the_unit_direction_between_two_texts():
    source, target = unit(16), unit(16)
    direction = text_difference(target, source)
    assert direction.norm().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(source + (target - source).norm() * direction, target)
    with pytest.raises(ValueError, match="define no direction"):
        text_difference(source, source)
