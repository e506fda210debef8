from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from unclip.diffusion.schedule import (
    SCHEDULES,
    cosine_alpha_bar,
    linear_alpha_bar,
    linspace_timesteps,
    log_snr_timesteps,
)


@pytest.mark.parametrize(
    ("ours", "name"), [(cosine_alpha_bar, "squaredcos_cap_v2"), (linear_alpha_bar, "linear")]
)
def test_schedules_equal_diffusers(ours, name):
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name).alphas_cumprod
    # theirs is a float32 product of a thousand factors
    torch.testing.assert_close(ours(1000), theirs.double(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("spacing", [linspace_timesteps, log_snr_timesteps])
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 250])
def test_spacings_descend_from_the_last_timestep(spacing, steps):
    timesteps = spacing(cosine_alpha_bar(1000), steps)
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0
    assert all(a > b for a, b in pairwise(timesteps))
    assert len(timesteps) <= steps


def test_seven_linspace_timesteps_equal_karlos():
    assert linspace_timesteps(cosine_alpha_bar(1000), 7) == [999, 832, 666, 500, 333, 166, 0]


def test_log_snr_timesteps_are_evenly_spaced_in_log_snr():
    alpha_bar = cosine_alpha_bar(1000)
    timesteps = log_snr_timesteps(alpha_bar, 10)
    gaps = torch.log(alpha_bar / (1 - alpha_bar))[timesteps[1:]].diff()
    assert gaps.max() / gaps.min() < 1.2


@pytest.mark.parametrize("timesteps", [1, 2, 10, 19, 20, 21])
@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_few_steps_keep_alpha_bar_between_0_and_1(schedule, timesteps):
    alpha_bar = schedule(timesteps)
    assert (alpha_bar > 0).all() and (alpha_bar < 1).all() and (alpha_bar.diff() < 0).all()
