"""One step after another, our samplers compute what the schedulers of diffusers compute."""

import pytest
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
    ddpm,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    randn,
    unipc,
)

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
LINSPACE = {**COSINE, "timestep_spacing": "linspace", "clip_sample": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}


def network(x_t, t):
    """Depend on x_t and t in some way."""
    return 0.3 * torch.sin(3 * x_t) + 0.1 * torch.cos(t.float() / 100)[:, None, None, None]


@pytest.fixture
def x_T():
    return torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("prediction", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
def test_ddim(prediction, theirs, x_T, generators):
    diffusion = GaussianDiffusion(prediction=prediction)
    denoise = diffusion.denoiser(network, clip_range=1.0)
    ours = ddim(denoise, x_T, diffusion, steps=10, generators=generators(2))
    scheduler = DDIMScheduler(**LINSPACE, prediction_type=theirs)
    scheduler.set_timesteps(10)
    x, timesteps = x_T, diffusion.sampling_timesteps("linspace", 10)
    assert scheduler.timesteps.tolist() == timesteps
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        # the scheduler steps to t - T // steps, which we set to our next timestep
        scheduler.config.num_train_timesteps, scheduler.num_inference_steps = t - s, 1
        output = network(x, torch.full((2,), t))
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddpm_with_the_same_noise(variance, x_T, generators, monkeypatch):
    diffusion = GaussianDiffusion(prediction="eps", variance=variance)

    def output(x_t, t):
        mean = network(x_t, t)
        return torch.cat([mean, torch.tanh(x_t)], dim=1) if diffusion.learns_variance else mean

    denoise = diffusion.denoiser(output, clip_range=1.0)
    ours = ddpm(denoise, x_T, diffusion, steps=25, generators=generators(2))
    scheduler = DDPMScheduler(**LINSPACE, variance_type=variance)
    scheduler.set_timesteps(25)
    assert scheduler.timesteps.tolist() == diffusion.sampling_timesteps("linspace", 25)
    share_noise(monkeypatch, "scheduling_ddpm", generators(2))
    x = x_T
    for t in scheduler.timesteps:
        step = scheduler.step(output(x, t.expand(2)), t, x)
        x = step.prev_sample if t > 0 else step.pred_original_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "options"),
    [
        (dpm_solver_pp_2m, DPMSolverMultistepScheduler, {}),
        (dpm_solver_pp_2m_sde, DPMSolverMultistepScheduler, SDE),
        (unipc, UniPCMultistepScheduler, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_solvers(sampler, scheduler, options, x_T, generators, monkeypatch):
    diffusion = GaussianDiffusion(prediction="eps")
    # away from t = 999, where the float32 schedule has lost α
    timesteps = torch.linspace(950, 10, 20).round().long()
    own = {"timestep_spacing": timesteps.tolist(), "generators": generators(2)}
    ours = sampler(diffusion.denoiser(network), x_T, diffusion, steps=20, **own)
    theirs = scheduler(**COSINE, final_sigmas_type="zero", **options)
    theirs.set_timesteps(20)
    alpha_bar = diffusion.alpha_bar
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()[timesteps].float()
    theirs.timesteps, theirs.sigmas = timesteps, torch.cat([sigmas, torch.zeros(1)])
    share_noise(monkeypatch, "scheduling_dpmsolver_multistep", generators(2))
    x = x_T
    for t in timesteps:
        x = theirs.step(network(x, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def share_noise(monkeypatch, module, generators):
    """Make a scheduler of diffusers sample its noise from our generators."""
    monkeypatch.setattr(
        f"diffusers.schedulers.{module}.randn_tensor",
        lambda shape, **_: randn(shape[1:], generators),
    )
