import numpy as np
import pytest
import torch

from unclip.evaluation.frechet import Gaussian, bootstrap_error, fit_gaussian, frechet_distance


def test_moments_are_numpys_in_float64():
    features = torch.randn(50, 6) + 1e4
    fitted = fit_gaussian(features)
    values = features.double().numpy()
    assert fitted.mean.dtype == fitted.covariance.dtype == torch.float64
    np.testing.assert_allclose(fitted.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(fitted.covariance, np.cov(values, rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("count", [200, 10], ids=["full rank", "singular"])
def test_equals_the_formula_with_scipys_square_root(count):
    linalg = pytest.importorskip("scipy.linalg")
    first = fit_gaussian(torch.randn(count, 16) @ torch.randn(16, 16))
    second = fit_gaussian(torch.randn(count, 16) @ torch.randn(16, 16) + 0.5)
    root = linalg.sqrtm((first.covariance @ second.covariance).numpy())
    expected = (
        (first.mean - second.mean).square().sum().item()
        + first.covariance.trace().item()
        + second.covariance.trace().item()
        - 2 * np.real(np.trace(root))
    )
    tolerance = 1e-9 if count == 200 else 1e-4  # scipy loses digits where the product is singular
    assert frechet_distance(first, second) == pytest.approx(expected, rel=tolerance)


def test_gaussians_with_known_moments():
    """For commuting covariances it is |m1 - m2|² + Σ (s1 - s2)²."""
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    first_std = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    second_std = torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64)

    def gaussian(mean: float, std: torch.Tensor) -> Gaussian:
        covariance = rotation * std.square() @ rotation.T
        return Gaussian(torch.full((3,), mean, dtype=torch.float64), covariance)

    expected = 3 * 2.0**2 + (first_std - second_std).square().sum().item()
    first, second = gaussian(1.0, first_std), gaussian(3.0, second_std)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-7)


def test_a_set_is_at_distance_zero_from_itself():
    fitted = fit_gaussian(torch.randn(40, 8))
    assert 0 <= frechet_distance(fitted, fitted) < 1e-9


def test_a_constant_set_has_a_distance():
    fitted = fit_gaussian(torch.randn(40, 8))
    constant = fit_gaussian(torch.zeros(40, 8))
    expected = fitted.mean.square().sum() + fitted.covariance.trace()
    assert frechet_distance(constant, fitted) == pytest.approx(float(expected), rel=1e-9)


def test_the_bootstrap_error_is_repeatable_and_shrinks_with_the_sample():
    small = bootstrap_error(torch.randn(50, 4), torch.randn(50, 4), resamples=30)
    first, second = torch.randn(3000, 4), torch.randn(3000, 4)
    large = bootstrap_error(first, second, resamples=30)
    assert large == bootstrap_error(first, second, resamples=30)
    assert 0 < large < small


@pytest.mark.parametrize("features", [torch.zeros(1, 4), torch.full((5, 4), torch.nan)])
def test_what_has_no_covariance_is_refused(features):
    with pytest.raises(ValueError, match="feature"):
        fit_gaussian(features)
