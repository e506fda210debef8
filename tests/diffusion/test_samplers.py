import math
from itertools import pairwise

import pytest
import scipy.stats
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

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
        (dpm_solver_pp_2m_sde, 50, {}),
        (unipc, 20, {}),
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


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpm_solver_pp_2m, 2), (unipc, 2)])
def test_error_falls_at_the_solver_s_order(sampler, order, generators):
    diffusion = GaussianDiffusion(timesteps=20_000)
    x_T = torch.linspace(-2, 2, 101)[None]
    errors = []
    for steps in (20, 40, 80):
        last = diffusion.sampling_timesteps("log_snr", steps)[-1]
        out = sampler(
            optimal_denoiser(diffusion),
            x_T,
            diffusion,
            steps=steps,
            timestep_spacing="log_snr",
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
        diffusion.denoiser(noisy_network, clip_range=1.0),
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
    x, timesteps = x_T, diffusion.sampling_timesteps("linspace", 10)
    assert theirs.timesteps.tolist() == timesteps
    for i, t in enumerate(timesteps):
        output = noisy_network(x, torch.full((2,), t))
        # their step goes to t - T // steps, ours to the next of the list: hand them ours
        previous = timesteps[i + 1] if i + 1 < len(timesteps) else -1
        theirs.config.num_train_timesteps, theirs.num_inference_steps = t - previous, 1
        x = theirs.step(output, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddpm_equals_diffusers_with_the_same_noise(variance, generators, monkeypatch):
    diffusion = GaussianDiffusion(prediction="eps", variance=variance)

    def network(x_t, t):
        output = noisy_network(x_t, t)
        return torch.cat([output, torch.tanh(x_t)], dim=1) if diffusion.learns_variance else output

    x_T = torch.randn(2, 3, 8, 8)
    ours = ddpm(
        diffusion.denoiser(network, clip_range=1.0),
        x_T,
        diffusion,
        steps=25,
        generators=generators(2),
    )
    theirs = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type=variance,
        timestep_spacing="linspace",
        clip_sample=True,
    )
    theirs.set_timesteps(25)
    assert theirs.timesteps.tolist() == diffusion.sampling_timesteps("linspace", 25)
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
    for sampler in (ddpm, ddim, dpm_solver_pp_2m, dpm_solver_pp_2m_sde, unipc):
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


MIXTURE = ((0.3, -0.8, 0.1), (0.7, 0.5, 0.2))  # weight, mean, deviation


def mixture_denoiser(diffusion):
    """E[x0 | x_t] for a mixture of two normals, weighed by their likelihoods of x_t."""

    def denoise(x_t, t):
        alpha_bar = diffusion.alpha_bar[t].item()
        likelihoods, means = [], []
        for weight, mean, deviation in MIXTURE:
            variance = alpha_bar * deviation**2 + 1 - alpha_bar
            off = x_t.double() - math.sqrt(alpha_bar) * mean
            likelihoods.append(weight / math.sqrt(variance) * torch.exp(-(off**2) / (2 * variance)))
            means.append(mean + math.sqrt(alpha_bar) * deviation**2 / variance * off)
        x0 = sum(p * m for p, m in zip(likelihoods, means, strict=True)) / sum(likelihoods)
        x0 = x0.float()
        return Prediction(x0, (x_t - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar), None)

    return denoise


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [(ddpm, 500), (ddim, 250), (dpm_solver_pp_2m, 60), (dpm_solver_pp_2m_sde, 100), (unipc, 60)],
)
def test_samples_of_a_mixture_pass_kolmogorov_s_test(sampler, steps, generators):
    diffusion = GaussianDiffusion()
    own = generators(4)
    out = sampler(
        mixture_denoiser(diffusion), randn((500,), own), diffusion, steps=steps, generators=own
    )

    def distribution(x):
        return sum(w * scipy.stats.norm.cdf(x, m, s) for w, m, s in MIXTURE)

    assert scipy.stats.kstest(out.flatten().numpy(), distribution).statistic < 0.04


@pytest.mark.parametrize("sampler", [dpm_solver_pp_2m, unipc])
def test_solvers_equal_diffusers(sampler, generators):
    diffusion = GaussianDiffusion(prediction="eps")
    x_T, steps = torch.randn(2, 3, 8, 8), 20
    # away from t = 999, where a float32 schedule has lost α
    timesteps = torch.linspace(950, 10, steps).round().long()
    theirs = {
        dpm_solver_pp_2m: DPMSolverMultistepScheduler(
            beta_schedule="squaredcos_cap_v2", final_sigmas_type="zero"
        ),
        unipc: UniPCMultistepScheduler(beta_schedule="squaredcos_cap_v2", final_sigmas_type="zero"),
    }[sampler]
    x = at_timesteps(theirs, timesteps, x_T)
    ours = sampler(
        diffusion.denoiser(noisy_network),
        x_T,
        diffusion,
        steps=steps,
        timestep_spacing=timesteps.tolist(),
        generators=generators(2),
    )
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_the_stochastic_solver_equals_diffusers_with_the_same_noise(generators, monkeypatch):
    diffusion = GaussianDiffusion(prediction="eps")
    x_T, steps, noise = torch.randn(2, 3, 8, 8), 20, generators(2)
    timesteps = torch.linspace(950, 10, steps).round().long()
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        final_sigmas_type="zero",
        algorithm_type="sde-dpmsolver++",
    )
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor",
        lambda shape, **_: randn(shape[1:], noise),
    )
    x = at_timesteps(theirs, timesteps, x_T)
    ours = dpm_solver_pp_2m_sde(
        diffusion.denoiser(noisy_network),
        x_T,
        diffusion,
        steps=steps,
        timestep_spacing=timesteps.tolist(),
        generators=generators(2),
    )
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def at_timesteps(scheduler, timesteps, x):
    """What a scheduler of diffusers makes of `x` over exactly these timesteps."""
    scheduler.set_timesteps(len(timesteps))
    alpha_bar = GaussianDiffusion().alpha_bar
    scheduler.timesteps = timesteps
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()[timesteps].float()
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])
    for t in timesteps:
        x = scheduler.step(noisy_network(x, t.expand(len(x))), t, x).prev_sample
    return x


def test_inversion_finds_the_noise_that_ddim_starts_from(generators):
    diffusion = GaussianDiffusion()
    denoise = mixture_denoiser(diffusion)
    x0 = torch.cat([torch.linspace(-1, -0.6, 50), torch.linspace(0.2, 0.9, 50)])[None]

    def there_and_back(steps, iterations=1):
        run = {"steps": steps, "timestep_spacing": "log_snr"}
        x_T = ddim_invert(denoise, x0, diffusion, iterations=iterations, **run)
        return ddim(denoise, x_T, diffusion, generators=generators(1), **run)

    def error(*run):
        return (there_and_back(*run) - x0).abs().mean().item()

    errors = [error(steps) for steps in (25, 50, 100)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert error(25, 5) < 0.002 < 0.05 * errors[0]


def test_inversion_of_normal_data_is_the_flow_s_own(generators):
    """For N(μ, σ²) the flow is affine: an image so many σ off goes to as many deviations of x_T."""
    diffusion = GaussianDiffusion()
    x0 = torch.linspace(-1, 2, 31)[None]
    x_T = ddim_invert(optimal_denoiser(diffusion), x0, diffusion, steps=500, iterations=3)
    first = diffusion.alpha_bar[-1].item()
    deviation = math.sqrt(first * DEVIATION**2 + 1 - first)
    expected = math.sqrt(first) * MEAN + deviation * (x0 - MEAN) / DEVIATION
    torch.testing.assert_close(x_T, expected, atol=0.02, rtol=0.02)


def pure_noise_diffusion():
    """A process whose last timestep is pure noise."""
    diffusion = GaussianDiffusion(schedule="linear", prediction="v")
    diffusion.alpha_bar[-1] = 0.0
    return diffusion


@pytest.mark.parametrize("sampler", [ddpm, ddim, dpm_solver_pp_2m, dpm_solver_pp_2m_sde, unipc])
def test_pure_noise_as_the_last_step_is_finite(sampler, generators):
    diffusion = pure_noise_diffusion()
    own = generators(8)
    out = sampler(
        optimal_denoiser(diffusion), randn((500,), own), diffusion, steps=250, generators=own
    )
    assert out.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert out.std().item() == pytest.approx(DEVIATION, abs=0.04)


@pytest.mark.parametrize("steps", [2, 16, 40])
def test_ancestral_ddim_from_pure_noise_draws_it_all_anew(steps, generators):
    """Rounding takes nothing below zero, and of x_T nothing is left after the first step."""
    diffusion = pure_noise_diffusion()

    def drawn(x_T):
        run = {"steps": steps, "eta": 1.0, "generators": generators(8)}
        return ddim(optimal_denoiser(diffusion), x_T, diffusion, **run)

    out = drawn(torch.randn(8, 500))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.03)
    torch.testing.assert_close(out, drawn(torch.randn(8, 500)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_goes_from_zero_to_one(eta, generators):
    diffusion = GaussianDiffusion()
    with pytest.raises(ValueError, match="eta is"):
        ddim(
            optimal_denoiser(diffusion),
            torch.randn(1, 4),
            diffusion,
            steps=4,
            generators=generators(1),
            eta=eta,
        )


def test_analytic_variance_beats_the_fixed_one_in_few_steps(generators):
    """With the optimal denoiser's error the chain's deviation is right at any number of steps."""
    found = {}
    for variance in ("fixed_small", "analytic"):
        diffusion = GaussianDiffusion(variance=variance)
        if variance == "analytic":
            t = torch.arange(1000)
            alpha_bar = diffusion.alpha_bar
            error = DEVIATION**2 * (1 - alpha_bar) / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
            diffusion.fit_error(t, error)
        own = generators(16)
        timesteps = [999, 700, 450, 250, 100, 1]
        out = ddpm(
            optimal_denoiser(diffusion),
            randn((1000,), own),
            diffusion,
            steps=len(timesteps),
            timestep_spacing=timesteps,
            generators=own,
        )
        found[variance] = abs(out.std().item() - DEVIATION)
    assert found["analytic"] < 0.01
    assert found["fixed_small"] > 2 * found["analytic"]


def test_a_callback_can_end_the_sampling(generators):
    def callback(step, steps, x0):
        if step == 2:
            raise KeyboardInterrupt

    diffusion = GaussianDiffusion()
    with pytest.raises(KeyboardInterrupt):
        unipc(
            optimal_denoiser(diffusion),
            torch.randn(1, 4),
            diffusion,
            steps=6,
            generators=generators(1),
            callback=callback,
        )
