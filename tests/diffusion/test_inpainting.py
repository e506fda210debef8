import math

import pytest
import torch

from unclip.diffusion import GaussianDiffusion, inpaint, randn
from unclip.diffusion.gaussian import Prediction
from unclip.diffusion.inpainting import jump_schedule

CORRELATION = 0.9


def pair_denoiser(diffusion):
    """E[x0 | x_t] for pairs of standard normal numbers with a correlation."""
    covariance = torch.tensor([[1, CORRELATION], [CORRELATION, 1]])

    def denoise(x_t, t):
        alpha_bar = diffusion.alpha_bar[t].item()
        noisy = alpha_bar * covariance + (1 - alpha_bar) * torch.eye(2)
        x0 = x_t @ (math.sqrt(alpha_bar) * covariance @ torch.linalg.inv(noisy)).T
        return Prediction(x0, (x_t - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar), None)

    return denoise


def painted(generators, diffusion=None, **settings):
    diffusion, seeds = diffusion or GaussianDiffusion(), generators(400)
    known = torch.tensor([1.5, 99.0]).expand(400, 2)
    return inpaint(
        pair_denoiser(diffusion),
        randn((2,), seeds),
        diffusion,
        known=known,
        mask=torch.tensor([False, True]),
        generators=seeds,
        **settings,
    )


def test_what_is_known_is_kept_to_the_bit(generators):
    diffusion, seeds = GaussianDiffusion(), generators(2)
    known, mask = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8) > 0.5
    x0 = inpaint(
        lambda x_t, t: Prediction(0.5 * x_t, x_t, None),
        randn((3, 8, 8), seeds),
        diffusion,
        known=known,
        mask=mask,
        steps=12,
        generators=seeds,
    )
    keep = ~mask.expand_as(x0)
    assert torch.equal(x0[keep], known[keep])
    assert (x0 != known)[~keep].all()


def test_resampling_brings_the_conditional_mean(generators):
    """Given 1.5 the other number's mean is 0.9 · 1.5; a single pass falls short of it."""
    expected = CORRELATION * 1.5
    once = painted(generators, steps=20, jump_n_sample=1)[:, 1].mean().item()
    often = painted(generators, steps=20, jump_n_sample=10, jump_length=3)[:, 1].mean().item()
    assert abs(often - expected) < 0.5 * abs(once - expected)
    assert often == pytest.approx(expected, abs=0.15)


def test_it_starts_from_pure_noise(generators):
    diffusion = GaussianDiffusion(schedule="linear", prediction="v")
    diffusion.alpha_bar[-1] = 0.0
    often = painted(generators, diffusion, steps=40, jump_n_sample=10, jump_length=3)[:, 1]
    assert often.mean().item() == pytest.approx(CORRELATION * 1.5, abs=0.15)


def test_jump_schedule():
    assert jump_schedule(4, jump_length=10, jump_n_sample=5) == [0, 1, 2, 3]
    assert jump_schedule(5, jump_length=2, jump_n_sample=1) == [0, 1, 2, 3, 4]
    assert jump_schedule(5, jump_length=2, jump_n_sample=2) == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]
    for count in (1, 2, 7, 25):
        places = jump_schedule(count, jump_length=3, jump_n_sample=4)
        assert places[0] == 0 and places[-1] == count - 1
        assert all(places.count(place) <= 8 for place in places)


def test_the_callback_counts_the_evaluations(generators):
    calls, evaluated = [], []
    diffusion = GaussianDiffusion()

    def denoise(x_t, t):
        evaluated.append(t)
        return Prediction(x_t, x_t, None)

    inpaint(
        denoise,
        torch.zeros(1, 2),
        diffusion,
        known=torch.zeros(1, 2),
        mask=torch.tensor([True, False]),
        steps=8,
        generators=generators(1),
        jump_length=2,
        jump_n_sample=3,
        callback=lambda step, steps, x0: calls.append((step, steps)),
    )
    assert calls == [(k + 1, len(evaluated)) for k in range(len(evaluated))]


def test_a_picture_does_not_depend_on_its_batch(generators):
    def one(rows):
        seeds = [torch.Generator().manual_seed(seed) for seed in rows]
        known, mask = torch.ones(1, 2).expand(len(rows), 2), torch.tensor([True, False])
        return inpaint(
            lambda x_t, t: Prediction(0.5 * x_t, x_t, None),
            randn((2,), seeds),
            GaussianDiffusion(),
            known=known,
            mask=mask,
            steps=6,
            generators=seeds,
        )

    assert torch.equal(one([1, 2])[1:], one([2]))


def test_settings_that_make_no_sense(generators):
    with pytest.raises(ValueError, match="both must be 1 or more"):
        painted(generators, steps=5, jump_length=0)
    with pytest.raises(ValueError, match="eta is 2"):
        painted(generators, steps=5, eta=2)
