import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from unclip.diffusion import LogitNormal
from unclip.diffusion.gaussian import GaussianDiffusion, discretized_log_likelihood, normal_kl

PREDICTIONS = ["x0", "eps", "v"]


@pytest.fixture
def diffusion():
    return GaussianDiffusion()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "cosin"}, "cosine, linear"),
        ({"prediction": "noise"}, "x0, eps, v"),
        ({"variance": "learned"}, "fixed_small, learned_range, analytic"),
        ({"loss_weight": "snr"}, "simple, velocity, min_snr"),
        ({"huber": 0.0}, "huber is 0.0; it must be positive"),
    ],
)
def test_unknown_values_of_an_argument_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**wrong)


@pytest.mark.parametrize(
    ("spacing", "steps", "message"),
    [
        ("linspace", 0, "steps is 0"),
        ("logsnr", 4, "linspace, log_snr"),
        ([3, 997, 500], 8, "steps is 8, but there are 3 timesteps"),
        ([1000, 3], 2, "from 0 to 999"),
    ],
)
def test_sampling_timesteps_may_be_a_list_in_any_order_but_not_impossible(
    spacing, steps, message, diffusion
):
    assert diffusion.sampling_timesteps([3, 997, 500], 3) == [997, 500, 3]
    with pytest.raises(ValueError, match=message):
        diffusion.sampling_timesteps(spacing, steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_converted_back_to_x0_and_eps(prediction):
    diffusion = GaussianDiffusion(prediction=prediction)
    x0, noise = torch.randn(64, 3), torch.randn(64, 3)
    t = torch.linspace(10, 950, 64).long()
    x_t = diffusion.add_noise(x0, noise, t)
    predicted = diffusion.predict(diffusion.target(x0, noise, t), x_t, t)
    torch.testing.assert_close(predicted.x0, x0, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(predicted.eps, noise, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipping_keeps_x0_and_eps_consistent(prediction):
    diffusion = GaussianDiffusion(prediction=prediction)
    x_t, t = torch.randn(16, 3), torch.full((16,), 700)
    predicted = diffusion.predict(torch.randn(16, 3), x_t, t, clip_range=0.5)
    assert predicted.x0.abs().max() <= 0.5
    torch.testing.assert_close(diffusion.add_noise(predicted.x0, predicted.eps, t), x_t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss_weight", ["velocity", "min_snr"])
def test_an_error_of_x0_has_the_same_weighted_loss_for_every_prediction(prediction, loss_weight):
    diffusion = GaussianDiffusion(prediction=prediction, loss_weight=loss_weight)
    x0, noise, error = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8)
    t = torch.tensor([50, 300, 600, 900])
    x_t = diffusion.add_noise(x0, noise, t)
    alpha_bar = diffusion.alpha_bar[t].float()[:, None]
    wrong_x0 = x0 + error
    wrong_noise = (x_t - alpha_bar.sqrt() * wrong_x0) / (1 - alpha_bar).sqrt()
    output = diffusion.target(wrong_x0, wrong_noise, t)
    loss = diffusion.loss(output, x0, noise, x_t, t)["loss"]
    snr = (alpha_bar / (1 - alpha_bar))[:, 0]
    weight = (snr + 1 if loss_weight == "velocity" else snr).clamp(max=5)
    torch.testing.assert_close(loss, weight * error.square().mean(dim=1), rtol=1e-3, atol=1e-5)


def test_the_pseudo_huber_loss_equals_its_formula():
    """Errors of 4/3 δ and 12/5 δ complete Pythagorean triples: the loss is 4/3 δ² and 16/5 δ²."""
    delta, t = 0.3, torch.tensor([500, 500, 500])
    diffusion = GaussianDiffusion(prediction="x0", huber=delta)
    error = delta * torch.tensor([[4 / 3], [-12 / 5], [1e-2]]).expand(-1, 6)
    zero = torch.zeros(3, 6)
    losses = diffusion.loss(error, zero, zero, zero, t)
    expected = delta**2 * torch.tensor([4 / 3, 16 / 5, 1e-4])
    torch.testing.assert_close(losses["loss"], expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(losses["mse"], error.square().mean(dim=1))


def test_the_posterior_follows_bayes_rule(diffusion):
    """q(x_{t-1} | x_t, x0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x0) is a product of two Gaussians."""
    x0, x_t, t = torch.tensor([[0.3]]), torch.tensor([[-1.1]]), torch.tensor([400])
    alpha_bar_t, alpha_bar_s = diffusion.alpha_bar[[400, 399]].tolist()
    alpha = alpha_bar_t / alpha_bar_s
    precision = alpha / (1 - alpha) + 1 / (1 - alpha_bar_s)
    weighted = math.sqrt(alpha) * -1.1 / (1 - alpha)
    weighted += math.sqrt(alpha_bar_s) * 0.3 / (1 - alpha_bar_s)
    log_variance, _ = diffusion.log_variance_bounds(t, x_t)
    mean = diffusion.posterior_mean(x0, x_t, t).item()
    assert mean == pytest.approx(weighted / precision, rel=1e-5)
    assert log_variance.item() == pytest.approx(-math.log(precision), rel=1e-5)


def test_the_kl_divergence_of_normals_equals_quadrature():
    p, q = scipy.stats.norm(0.3, math.exp(0.1)), scipy.stats.norm(-0.4, math.exp(-0.35))
    x = np.linspace(-15, 15, 200_001)
    expected = np.trapezoid(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), x)
    arguments = (torch.tensor(value) for value in (0.3, 0.2, -0.4, -0.7))
    assert normal_kl(*arguments).item() == pytest.approx(expected, rel=1e-5)


def test_the_discretized_likelihood_equals_scipys_and_sums_to_one():
    levels = torch.arange(256).float() / 127.5 - 1
    mean, scale = 0.13, 0.07
    ours = discretized_log_likelihood(levels, torch.tensor(mean), torch.tensor(math.log(scale)))
    normal = scipy.stats.norm(mean, scale)
    upper, lower = normal.cdf(levels + 1 / 255), normal.cdf(levels - 1 / 255)
    upper[-1], lower[0] = 1, 0
    likely = (upper - lower) > 1e-4  # below it, float32 subtracts nearly equal tails
    expected = np.log((upper - lower)[likely])
    np.testing.assert_allclose(ours.numpy()[likely], expected, atol=1e-3)
    assert ours.exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_is_finite_at_both_ends_and_trains_only_the_variance(prediction, dtype):
    diffusion = GaussianDiffusion(prediction=prediction, variance="learned_range")
    x0, noise = torch.rand(4, 3, 4, 4) * 2 - 1, torch.randn(4, 3, 4, 4)
    t = torch.tensor([0, 1, 998, 999])
    x_t = diffusion.add_noise(x0, noise, t)
    output = torch.randn(4, 6, 4, 4).to(dtype).requires_grad_()
    bound = diffusion.variational_bound(output, x0, x_t, t)
    assert bound.isfinite().all()
    bound.sum().backward()
    assert output.grad.isfinite().all()
    assert (output.grad[:, :3] == 0).all()
    assert (output.grad[:, 3:] != 0).any()


def test_the_bound_is_zero_for_the_true_posterior():
    diffusion = GaussianDiffusion(prediction="x0", variance="learned_range")
    x0, t = torch.rand(2, 3, 4, 4), torch.tensor([300, 800])
    x_t = diffusion.add_noise(x0, torch.randn_like(x0), t)
    output = torch.cat([x0, -torch.ones_like(x0)], dim=1)  # fraction 0: the lower bound
    torch.testing.assert_close(diffusion.variational_bound(output, x0, x_t, t), torch.zeros(2))


def test_training_timesteps_cover_the_range_are_uniform_and_of_a_seed_stay_the_same(diffusion):
    sampled = torch.stack([diffusion.sample_timesteps(8, "cpu") for _ in range(2000)])
    assert (sampled.sort(dim=1).values // 125).unique(dim=0).shape[0] <= 9
    histogram = torch.histc(sampled[:, 0].float(), bins=10, min=0, max=1000)
    assert scipy.stats.chisquare(histogram.numpy()).pvalue > 1e-4
    assert sampled[0].tolist() == [371, 621, 746, 246, 496, 871, 996, 121]  # of seed 0


@pytest.mark.parametrize(("mean", "std"), [(0.6, 1.0), (-0.5, 0.4)])
def test_logit_normal_timesteps_follow_the_closed_form(mean, std):
    """Esser et al. 2024, eq. 19: logit(t / T) is normal."""
    diffusion = GaussianDiffusion(timestep_density=LogitNormal(mean=mean, std=std))
    sampled = torch.stack([diffusion.sample_timesteps(8, "cpu") for _ in range(2000)])

    def cdf(fraction):
        return scipy.stats.norm(mean, std).cdf(scipy.special.logit(fraction))

    fraction = (sampled.double() + torch.rand(2000, 8, dtype=torch.float64)).numpy() / 1000
    assert scipy.stats.kstest(fraction[:, 0], cdf).pvalue > 1e-4
    gaps = np.diff(cdf(np.sort(fraction, axis=1)), axis=1)
    np.testing.assert_allclose(gaps, 1 / 8, atol=0.01)  # one timestep in each of eight strata


def test_logit_normal_timesteps_stay_in_range_although_the_logit_is_infinite_at_its_ends():
    ends = LogitNormal(mean=0.6, std=1.0).quantile(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1 / (1 + math.exp(-0.6)), 1.0]))
    diffusion = GaussianDiffusion(timestep_density=LogitNormal(mean=9.0, std=3.0))
    sampled = diffusion.sample_timesteps(4000, "cpu")
    assert sampled.min() >= 0 and sampled.max() == 999
    with pytest.raises(ValueError, match="must be positive"):
        LogitNormal(mean=0.0, std=0.0)


def test_the_table_stays_float64_and_is_not_saved(diffusion):
    diffusion = diffusion.to(torch.bfloat16)
    assert diffusion.alpha_bar.dtype == torch.float64
    assert not diffusion.state_dict()


def test_the_error_of_an_analytic_variance_is_fitted_by_timestep_and_saved():
    diffusion = GaussianDiffusion(variance="analytic")
    t = torch.randint(0, 1000, (50_000,))
    diffusion.fit_error(t, t.float() / 1000 + 0.1 * torch.randn(50_000))
    expected = torch.arange(1000, dtype=torch.float64) / 1000
    torch.testing.assert_close(diffusion.x0_error, expected, atol=0.02, rtol=0)
    assert set(diffusion.state_dict()) == {"x0_error"}
    with pytest.raises(ValueError, match="every hundredth"):
        diffusion.fit_error(torch.tensor([3]), torch.tensor([1.0]))
