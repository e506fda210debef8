import pytest
import torch
from closed_forms import CORRELATION, pair_denoiser, pure_noise_diffusion

from unclip.diffusion import GaussianDiffusion, inpaint, randn
from unclip.diffusion.gaussian import Prediction
from unclip.diffusion.inpainting import jump_schedule

FIRST = 1.5


def halve(x_t, t):
    return Prediction(0.5 * x_t, x_t, None)


@pytest.fixture
def second_numbers(generators):
    """Inpaint the second of two correlated numbers, given that the first is 1.5."""

    def run(diffusion=None, **options):
        diffusion, own = diffusion or GaussianDiffusion(), generators(400)
        options |= {"mask": torch.tensor([False, True]), "generators": own}
        known = torch.tensor([FIRST, 99.0]).expand(400, 2)
        denoise, x_T = pair_denoiser(diffusion), randn((2,), own)
        return inpaint(denoise, x_T, diffusion, known=known, **options)[:, 1]

    return run


def test_the_known_part_is_kept_bit_for_bit(generators):
    own, known, mask = generators(2), torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8) > 0.5
    options = {"known": known, "mask": mask, "steps": 12, "generators": own}
    x0 = inpaint(halve, randn((3, 8, 8), own), GaussianDiffusion(), **options)
    mask = mask.expand_as(x0)
    assert torch.equal(x0[~mask], known[~mask])
    assert (x0 != known)[mask].all()


def test_resampling_leads_to_the_conditional_mean(second_numbers):
    """The mean of the second number is 0.9 · 1.5; a single pass does not reach it."""
    expected = CORRELATION * FIRST
    once = second_numbers(steps=20, jump_n_sample=1).mean().item()
    often = second_numbers(steps=20, jump_n_sample=10, jump_length=3).mean().item()
    assert abs(often - expected) < 0.5 * abs(once - expected)
    assert often == pytest.approx(expected, abs=0.15)


def test_it_starts_from_pure_noise(second_numbers):
    samples = second_numbers(pure_noise_diffusion(), steps=40, jump_n_sample=10, jump_length=3)
    assert samples.mean().item() == pytest.approx(CORRELATION * FIRST, abs=0.15)


@pytest.mark.parametrize(
    ("steps", "jump_length", "jump_n_sample", "expected"),
    [
        (4, 10, 5, [0, 1, 2, 3]),
        (5, 2, 1, [0, 1, 2, 3, 4]),
        (5, 2, 2, [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]),
    ],
)
def test_the_jump_schedule_repeats_groups_of_steps(steps, jump_length, jump_n_sample, expected):
    assert jump_schedule(steps, jump_length, jump_n_sample) == expected


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_the_jump_schedule_goes_from_the_first_to_the_last_timestep(steps):
    indices = jump_schedule(steps, jump_length=3, jump_n_sample=4)
    assert indices[0] == 0 and indices[-1] == steps - 1
    assert all(indices.count(index) <= 8 for index in indices)


def test_the_callback_counts_the_evaluations(generators):
    calls, zeros, mask = [], torch.zeros(1, 2), torch.tensor([True, False])
    options = {"steps": 8, "jump_length": 2, "jump_n_sample": 3, "generators": generators(1)}
    options["callback"] = lambda step, steps, x0: calls.append((step, steps))
    inpaint(halve, zeros, GaussianDiffusion(), known=zeros, mask=mask, **options)
    evaluations = 20  # 7 steps, of which the first 6 are sampled 3 times, and the last evaluation
    assert calls == [(k + 1, evaluations) for k in range(evaluations)]


def test_an_image_does_not_depend_on_its_batch():
    def sample(seeds):
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        known, mask = torch.ones(len(seeds), 2), torch.tensor([True, False])
        options = {"known": known, "mask": mask, "steps": 6, "generators": own}
        return inpaint(halve, randn((2,), own), GaussianDiffusion(), **options)

    assert torch.equal(sample([1, 2])[1:], sample([2]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"jump_length": 0}, "both must be 1 or more"), ({"eta": 2}, "eta is 2")],
)
def test_settings_out_of_range_are_errors(wrong, message, second_numbers):
    with pytest.raises(ValueError, match=message):
        second_numbers(steps=5, **wrong)
