from unittest.mock import Mock

import pytest
import torch
from tiny_stages import decoder, embedded_batch, randomized

from unclip.stages import decoder_edits

MEAN, STD = 0.2, 0.3


class OptimalNetwork(torch.nn.Module):
    """A network that predicts E[x0 | x_t] of normal data."""

    def __init__(self, diffusion):
        super().__init__()
        self.diffusion = diffusion

    def bind(self, **condition):
        return self

    def forward(self, x_t, t):
        alpha_bar = self.diffusion.alpha_bar[t].float().reshape(-1, 1, 1, 1)
        gain = alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
        return MEAN + gain * (x_t - alpha_bar.sqrt() * MEAN)


@pytest.fixture
def stage():
    return randomized(decoder(feature_maps=True))


@pytest.fixture
def condition(stage):
    return stage.condition(embedded_batch(2))


def test_timesteps_end_above_zero(stage):
    assert decoder_edits.timesteps(stage.diffusion, 4) == [999, 699, 400, 100]
    assert decoder_edits.timesteps(stage.diffusion, 1) == [999]
    assert decoder_edits.timesteps(stage.diffusion, 900) == list(range(999, 99, -1))
    with pytest.raises(ValueError, match="steps of the decoder is 901; it can be 1 to 900"):
        decoder_edits.timesteps(stage.diffusion, 901)


def test_reconstruction_improves_with_steps_and_iterations(
    stage, condition, generators, monkeypatch
):
    stage.network, errors = OptimalNetwork(stage.diffusion), []
    image = (MEAN + STD * torch.randn(2, 3, 8, 8)).clamp(-1, 1)
    for iterations, steps in ((1, 5), (1, 10), (1, 40), (4, 40)):
        monkeypatch.setattr(decoder_edits, "ITERATIONS", iterations)
        noise = decoder_edits.invert(stage, condition, image, steps=steps)
        options = {"generators": generators(2), "steps": steps}
        back = decoder_edits.render(stage, condition, noise, **options)
        errors.append((back - image).square().mean().sqrt().item())
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.3 * errors[0]


@pytest.mark.parametrize(("eta", "same"), [(0.0, True), (0.5, False)])
def test_the_generators_matter_only_if_eta_is_above_zero(stage, condition, eta, same, generators):
    noise = torch.randn(2, 3, 8, 8)
    first, second = (
        decoder_edits.render(
            stage, condition, noise, generators=generators(2, seed), eta=eta, steps=3
        )
        for seed in (0, 9)
    )
    assert torch.equal(first, second) == same


def test_edits_clip_x0_as_sampling_does(stage, condition, generators, monkeypatch):
    image, mask = torch.rand(2, 3, 8, 8), torch.ones(2, 1, 8, 8, dtype=torch.bool)
    denoiser, own = Mock(side_effect=stage.diffusion.denoiser), {"generators": generators(2)}
    monkeypatch.setattr(stage.diffusion, "denoiser", denoiser)
    decoder_edits.invert(stage, condition, image, steps=1)
    decoder_edits.render(stage, condition, image, **own, steps=1)
    decoder_edits.complete(stage, condition, image, mask, **own, steps=1)
    stage.sample(condition, **own)
    assert [call.args[1] for call in denoiser.call_args_list] == [1.0] * 4
