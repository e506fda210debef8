import math
from functools import partial
from itertools import pairwise

import pytest
import scipy.stats
import torch
from closed_forms import MEAN, MIXTURE, STD, mixture_denoiser, normal_denoiser, pure_noise_diffusion

from unclip.diffusion import (
    GaussianDiffusion,
    ddim,
    ddim_invert,
    ddpm,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    randn,
    unipc,
)

SAMPLERS = [ddpm, ddim, dpm_solver_pp_2m, dpm_solver_pp_2m_sde, unipc]


@pytest.fixture
def diffusion():
    return GaussianDiffusion()


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (ddpm, 500),
        (ddim, 250),
        (partial(ddim, eta=1.0), 500),
        (dpm_solver_pp_2m, 60),
        (dpm_solver_pp_2m_sde, 100),
        (unipc, 60),
    ],
)
def test_samples_of_a_mixture_pass_kolmogorovs_test(sampler, steps, diffusion, generators):
    own = generators(4)
    denoise, x_T = mixture_denoiser(diffusion), randn((500,), own)
    x0 = sampler(denoise, x_T, diffusion, steps=steps, generators=own)

    def cdf(x):
        return sum(w * scipy.stats.norm.cdf(x, m, s) for w, m, s in MIXTURE)

    assert scipy.stats.kstest(x0.flatten().numpy(), cdf).statistic < 0.04


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp_2m, 2), (unipc, 2)])
def test_the_error_decreases_with_the_solvers_order(sampler, order, generators):
    """For normal data the probability flow is affine: x_t stays as many deviations off its mean."""
    diffusion = GaussianDiffusion(timesteps=20_000)
    denoise, x_T = normal_denoiser(diffusion), torch.linspace(-2, 2, 101)[None]

    def mean_and_std(t):
        alpha_bar = diffusion.alpha_bar[t].item()
        return math.sqrt(alpha_bar) * MEAN, math.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)

    errors = []
    for steps in (20, 40, 80):
        last = diffusion.sampling_timesteps("log_snr", steps)[-1]
        (mean_T, std_T), (mean, std) = mean_and_std(-1), mean_and_std(last)
        exact = denoise(mean + std * (x_T - mean_T) / std_T, last).x0
        options = {"steps": steps, "timestep_spacing": "log_snr", "generators": generators(1)}
        x0 = sampler(denoise, x_T, diffusion, **options)
        errors.append((x0 - exact).square().mean().sqrt().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 0.75 * 2**order


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_from_a_last_timestep_of_pure_noise_is_finite(sampler, generators):
    diffusion, own = pure_noise_diffusion(), generators(8)
    denoise, x_T = normal_denoiser(diffusion), randn((500,), own)
    x0 = sampler(denoise, x_T, diffusion, steps=250, generators=own)
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x0.std().item() == pytest.approx(STD, abs=0.04)


@pytest.mark.parametrize("steps", [2, 16, 40])
def test_ancestral_ddim_from_pure_noise_does_not_depend_on_x_T(steps, generators):
    diffusion = pure_noise_diffusion()

    def sample(x_T):
        options = {"steps": steps, "eta": 1.0, "generators": generators(8)}
        return ddim(normal_denoiser(diffusion), x_T, diffusion, **options)

    x0 = sample(torch.randn(8, 500))
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.03)
    torch.testing.assert_close(x0, sample(torch.randn(8, 500)), atol=1e-5, rtol=0)


def test_the_analytic_variance_beats_the_fixed_one_in_few_steps(generators):
    """With the optimal denoiser's error the deviation is right at any number of steps."""
    timesteps, errors = [999, 700, 450, 250, 100, 1], {}
    for variance in ("fixed_small", "analytic"):
        diffusion = GaussianDiffusion(variance=variance)
        if variance == "analytic":
            alpha_bar = diffusion.alpha_bar
            error = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
            diffusion.fit_error(torch.arange(1000), error)
        own = generators(16)
        options = {"steps": len(timesteps), "timestep_spacing": timesteps, "generators": own}
        x0 = ddpm(normal_denoiser(diffusion), randn((1000,), own), diffusion, **options)
        errors[variance] = abs(x0.std().item() - STD)
    assert errors["analytic"] < 0.01
    assert errors["fixed_small"] > 2 * errors["analytic"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_callback_receives_every_step(sampler, diffusion, generators):
    calls, options = [], {"steps": 6, "generators": generators(1)}
    options["callback"] = lambda step, steps, x0: calls.append((step, steps, x0.shape))
    sampler(normal_denoiser(diffusion), torch.randn(1, 4), diffusion, **options)
    assert calls == [(k + 1, 6, (1, 4)) for k in range(6)]


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_an_eta_outside_zero_to_one_is_an_error(eta, diffusion, generators):
    options = {"steps": 4, "generators": generators(1), "eta": eta}
    with pytest.raises(ValueError, match="eta is"):
        ddim(normal_denoiser(diffusion), torch.randn(1, 4), diffusion, **options)


def test_inversion_finds_the_noise_that_ddim_starts_from(diffusion, generators):
    denoise = mixture_denoiser(diffusion)
    x0 = torch.cat([torch.linspace(-1, -0.6, 50), torch.linspace(0.2, 0.9, 50)])[None]

    def error(steps, iterations=1):
        options = {"steps": steps, "timestep_spacing": "log_snr"}
        x_T = ddim_invert(denoise, x0, diffusion, iterations=iterations, **options)
        back = ddim(denoise, x_T, diffusion, generators=generators(1), **options)
        return (back - x0).abs().mean().item()

    errors = [error(steps) for steps in (25, 50, 100)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert error(25, 5) < 0.002 < 0.05 * errors[0]


def test_inversion_of_normal_data_follows_the_affine_flow(diffusion):
    x0 = torch.linspace(-1, 2, 31)[None]
    x_T = ddim_invert(normal_denoiser(diffusion), x0, diffusion, steps=500, iterations=3)
    alpha_bar = diffusion.alpha_bar[-1].item()
    std = math.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    expected = math.sqrt(alpha_bar) * MEAN + std * (x0 - MEAN) / STD
    torch.testing.assert_close(x_T, expected, atol=0.02, rtol=0.02)


def test_the_callback_of_inversion_receives_every_evaluation(diffusion):
    calls, options = [], {"steps": 3, "iterations": 2}
    options["callback"] = lambda step, steps, x0: calls.append((step, steps))
    ddim_invert(normal_denoiser(diffusion), torch.randn(1, 4), diffusion, **options)
    assert calls == [(k + 1, 6) for k in range(6)]
