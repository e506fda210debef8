import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from unclip.diffusion import GaussianDiffusion, ddim, ddpm, dpm_solver_pp_2m, randn
from unclip.diffusion.gaussian import Prediction

MEAN, DEVIATION = 0.7, 0.4


def optimal_denoiser(diffusion):
    """E[x0 | x_t] for data N(MEAN, DEVIATION²): the network that a perfect training would give."""

    def denoise(x_t, t):
        alpha_bar = diffusion.alpha_bar[t].item()
        gain = math.sqrt(alpha_bar) * DEVIATION**2 / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
        x0 = MEAN + gain * (x_t - math.sqrt(alpha_bar) * MEAN)
        return Prediction(x0, (x_t - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar), None)

    return denoise


def exact_solution(x_T, diffusion, t_last):
    """Where the probability flow takes x_T, read as x0 at the last timestep: an affine map."""
    alpha_bar = diffusion.alpha_bar[t_last].item()
    first = diffusion.alpha_bar[-1].item()

    def deviation(ab):
        return math.sqrt(ab * DEVIATION**2 + 1 - ab)

    standard = (x_T - math.sqrt(first) * MEAN) / deviation(first)
    x = math.sqrt(alpha_bar) * MEAN + deviation(alpha_bar) * standard
    return optimal_denoiser(diffusion)(x, t_last).x0


@pytest.mark.parametrize(
    ("sampler", "steps", "options"),
    [
        (ddpm, 250, {}),
        (ddim, 100, {"eta": 0.0}),
        (ddim, 250, {"eta": 1.0}),
        (dpm_solver_pp_2m, 20, {}),
    ],
)
def test_samples_have_the_data_s_distribution(sampler, steps, options, generators):
    diffusion = GaussianDiffusion()
    noise_generators = generators(16)
    x_T = randn((500,), noise_generators)
    denoise = optimal_denoiser(diffusion)
    x0 = sampler(denoise, x_T, diffusion, steps=steps, generators=noise_generators, **options)
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x0.std().item() == pytest.approx(DEVIATION, abs=0.02)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp_2m, 2)])
def test_error_falls_at_the_solver_s_order(sampler, order, generators):
    diffusion = GaussianDiffusion(timesteps=20_000)
    x_T = torch.linspace(-2, 2, 101)[None]
    errors = []
    for steps in (20, 40, 80):
        last = diffusion.spacing("log_snr", steps)[-1]
        out = sampler(
            optimal_denoiser(diffusion),
            x_T,
            diffusion,
            steps=steps,
            spacing="log_snr",
            generators=generators(1),
        )
        errors.append((out - exact_solution(x_T, diffusion, last)).square().mean().sqrt().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 0.75 * 2**order


def noisy_network(x_t, t):
    """A stand-in network with some dependence on everything."""
    return 0.3 * torch.sin(3 * x_t) + 0.1 * torch.cos(t.float() / 100)[:, None, None, None]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddim_equals_diffusers(prediction, generators):
    diffusion = GaussianDiffusion(prediction=prediction)
    x_T = torch.randn(2, 3, 8, 8)
    ours = ddim(
        diffusion.denoiser(noisy_network, clip=1.0),
        x_T,
        diffusion,
        steps=10,
        generators=generators(2),
    )
    theirs = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction],
        timestep_spacing="linspace",
        clip_sample=True,
        set_alpha_to_one=True,
    )
    theirs.set_timesteps(10)
    x, timesteps = x_T, diffusion.spacing("linear", 10)
    assert theirs.timesteps.tolist() == timesteps
    for i, t in enumerate(timesteps):
        output = noisy_network(x, torch.full((2,), t))
        # their step goes to t - T // steps, ours to the next of the list: hand them ours
        previous = timesteps[i + 1] if i + 1 < len(timesteps) else -1
        theirs.config.num_train_timesteps, theirs.num_inference_steps = t - previous, 1
        x = theirs.step(output, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_equals_diffusers_with_the_same_noise(variance, generators, monkeypatch):
    diffusion = GaussianDiffusion(prediction="eps", variance=variance)

    def network(x_t, t):
        output = noisy_network(x_t, t)
        return torch.cat([output, torch.tanh(x_t)], dim=1) if diffusion.learns_variance else output

    x_T = torch.randn(2, 3, 8, 8)
    ours = ddpm(
        diffusion.denoiser(network, clip=1.0), x_T, diffusion, steps=25, generators=generators(2)
    )
    theirs = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type=variance,
        timestep_spacing="linspace",
        clip_sample=True,
    )
    theirs.set_timesteps(25)
    assert theirs.timesteps.tolist() == diffusion.spacing("linear", 25)
    noise, x = generators(2), x_T
    for t in theirs.timesteps:
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda shape, **_: randn(shape[1:], noise),
        )
        step = theirs.step(network(x, t.expand(2)), t, x)
        x = step.prev_sample if t > 0 else step.pred_original_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_each_generator_makes_its_own_sample(generators):
    diffusion = GaussianDiffusion()
    denoise = optimal_denoiser(diffusion)

    def run(seeds):
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        return ddpm(denoise, randn((4,), own), diffusion, steps=10, generators=own)

    together, alone = run([3, 7, 11]), run([7])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


def test_callback_sees_every_step(generators):
    diffusion = GaussianDiffusion()
    for sampler in (ddpm, ddim, dpm_solver_pp_2m):
        seen = []
        sampler(
            optimal_denoiser(diffusion),
            torch.randn(1, 4),
            diffusion,
            steps=6,
            generators=generators(1),
            callback=lambda step, steps, x0, seen=seen: seen.append((step, steps, x0.shape)),
        )
        assert seen == [(k + 1, 6, torch.Size([1, 4])) for k in range(6)]
