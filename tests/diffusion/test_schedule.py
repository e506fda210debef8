import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from unclip.diffusion.schedule import (
    cosine_alpha_bar,
    karras_spacing,
    leading_spacing,
    linear_alpha_bar,
    linear_spacing,
    log_snr,
    log_snr_spacing,
    sectioned_spacing,
    trailing_spacing,
    zero_terminal_snr,
)


def test_schedules_equal_diffusers():
    for ours, name in ((cosine_alpha_bar, "squaredcos_cap_v2"), (linear_alpha_bar, "linear")):
        theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name).alphas_cumprod
        # theirs is a float32 product of a thousand factors
        torch.testing.assert_close(ours(1000), theirs.double(), rtol=1e-4, atol=1e-8)


def test_cosine_follows_its_formula_away_from_the_cap():
    alpha_bar = cosine_alpha_bar(1000)
    t = 499
    f = math.cos(((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    f0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert alpha_bar[t].item() == pytest.approx(f / f0, rel=1e-9)


@pytest.mark.parametrize(
    "spacing", [linear_spacing, trailing_spacing, log_snr_spacing, karras_spacing]
)
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 250])
def test_spacings_descend_from_the_last_timestep(spacing, steps):
    timesteps = spacing(cosine_alpha_bar(1000), steps)
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0
    assert all(a > b for a, b in pairwise(timesteps))
    assert len(timesteps) <= steps


def test_linear_spacing_is_karlo_s_for_seven_steps():
    assert linear_spacing(cosine_alpha_bar(1000), 7) == [999, 832, 666, 500, 333, 166, 0]


def test_log_snr_spacing_is_even_in_log_snr():
    alpha_bar = cosine_alpha_bar(1000)
    timesteps = log_snr_spacing(alpha_bar, 10)
    log_snr = torch.log(alpha_bar / (1 - alpha_bar))[timesteps[1:]]
    gaps = log_snr.diff()
    assert gaps.max() / gaps.min() < 1.2


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_zero_terminal_snr_equals_diffusers(name):
    alpha_bar = {"cosine": cosine_alpha_bar, "linear": linear_alpha_bar}[name](1000)
    ours = zero_terminal_snr(alpha_bar)
    assert ours[-1] == 0
    assert ours[0].item() == pytest.approx(alpha_bar[0].item())
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(leading_spacing, "leading"), (trailing_spacing, "trailing")]
)
@pytest.mark.parametrize("steps", [10, 27, 50])
def test_even_spacings_equal_diffusers(ours, theirs, steps):
    scheduler = DDIMScheduler(timestep_spacing=theirs)
    scheduler.set_timesteps(steps)
    assert ours(cosine_alpha_bar(1000), steps) == scheduler.timesteps.tolist()


def test_glide_s_sections():
    """Five sections of 200: ten evenly from the first, two, its ends, from the last."""
    timesteps = sectioned_spacing(cosine_alpha_bar(1000), [10, 10, 3, 2, 2])
    assert timesteps[:7] == [999, 800, 799, 600, 599, 500, 400]
    assert timesteps[-10:] == [199, 177, 155, 133, 111, 88, 66, 44, 22, 0]
    assert len(timesteps) == 27
    with pytest.raises(ValueError, match="cannot give 11"):
        sectioned_spacing(cosine_alpha_bar(20), [11, 1])


def test_karras_spacing_equals_diffusers_sigmas():
    alpha_bar = linear_alpha_bar(1000)
    timesteps = karras_spacing(alpha_bar, 12, lowest=-20, highest=20)
    sigma = torch.exp(-0.5 * log_snr(alpha_bar))
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", use_karras_sigmas=True)
    theirs = scheduler._convert_to_karras(sigma[[-1, 0]].clone(), 12)
    nearest = (sigma.log()[None] - torch.as_tensor(theirs).log()[:, None]).abs().argmin(dim=1)
    assert max(abs(a - b) for a, b in zip(timesteps, nearest.tolist(), strict=True)) <= 1
