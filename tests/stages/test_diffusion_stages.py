from functools import partial

import pytest
import tiny_bundle
import torch
import torch.nn.functional as F
from tiny_stages import D, decoder, embedded_batch, prior, randomized, upsampler

from unclip.diffusion import GaussianDiffusion, ddpm
from unclip.stages.conditioning import Normalizer


def test_a_missing_input_is_replaced_by_the_null():
    stage, batch = randomized(decoder()), embedded_batch(2)
    full = stage.condition(batch)
    null = stage.null(full)
    no_text = stage.condition({key: batch[key] for key in ("image_embedding", "text_mask")})
    no_image = stage.condition({key: batch[key] for key in batch.keys() - {"image_embedding"}})
    for name in full:
        missing, given = (no_image, no_text) if name == "image_embedding" else (no_text, no_image)
        assert torch.equal(missing[name], null[name]) and torch.equal(given[name], full[name])


def test_a_decoder_drops_image_embedding_and_caption_independently():
    stage, batch = decoder(), embedded_batch(4000)
    with torch.no_grad():
        stage.null_image_embedding.fill_(100.0)
        stage.null_text.embedding.fill_(100.0)
    condition = stage._dropped(stage.condition(batch))
    image = (condition["image_embedding"] == 100).all(1).float()
    text = (condition["text_embedding"] == 100).all(1).float()
    assert image.mean().item() == pytest.approx(0.1, abs=0.02)
    assert text.mean().item() == pytest.approx(0.5, abs=0.03)
    assert (image * text).mean().item() == pytest.approx(0.1 * 0.5, abs=0.015)
    assert (condition["text_mask"].sum(1) == torch.where(text.bool(), 2, 4)).all()


def test_a_normalizer_fits_the_data_and_inverts_and_the_papers_scales_by_17_2():
    z = torch.randn(1000, D) * torch.arange(1, D + 1) + 3
    normalizer = Normalizer(D, "statistics")
    normalizer.fit(z)
    torch.testing.assert_close(normalizer(z).mean(0), torch.zeros(D), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalizer(z).std(0), torch.ones(D))
    torch.testing.assert_close(normalizer.denormalize(normalizer(z)), z)
    z = torch.randn(2, 1024)
    torch.testing.assert_close(Normalizer(1024, "paper")(z), 17.2 * z)


def test_statistics_are_fitted_to_the_first_samples(monkeypatch):
    monkeypatch.setattr("unclip.stages.conditioning.STATISTICS_SAMPLES", 100)
    batches = iter([embedded_batch(64) for _ in range(3)])
    stage = prior()
    stage.fit_statistics(batches)
    assert stage.image_scaling.std.min() > 0 and len(list(batches)) == 1


def test_a_prior_fits_its_analytic_variance_to_the_networks_error(generators):
    """The squared error of a network that predicts 0 is the mean square of the data."""
    stage, batches = prior(num_noise_samples=4), [embedded_batch(64) for _ in range(20)]
    stage.fit_statistics(batches)
    torch.nn.init.zeros_(stage.network.out.weight)
    torch.nn.init.zeros_(stage.network.out.bias)
    stage.diffusion = GaussianDiffusion(prediction="x0", variance="analytic")
    stage.fit_variance(batches)
    z = torch.cat([batch["image_embedding"] for batch in batches])
    expected = stage.image_scaling(z).square().mean().item()
    error = stage.diffusion.x0_error
    assert error.mean().item() == pytest.approx(expected, rel=0.02)
    assert (error / expected - 1).abs().max() < 0.5  # each timestep has only a few samples
    stage.sampler = partial(ddpm, steps=10)
    sample = stage.sample(stage.condition(embedded_batch()), generators=generators(4))
    assert sample.isfinite().all()


def test_a_residual_upsampler_starts_as_bicubic(generators):
    stage, batch = upsampler(residual=True), embedded_batch()
    out = stage.sample(stage.condition(batch), generators=generators(4))
    torch.testing.assert_close(out, stage.enlarge(batch["low_res"]))


def test_a_scaled_input_removes_the_noise_from_a_single_step(generators):
    def difference(**options) -> float:
        torch.manual_seed(0)
        stage = randomized(upsampler(residual=True, **options))
        condition = {"low_res": torch.rand(1, 3, 8, 8).mul(2).sub(1).expand(2, -1, -1, -1)}
        first, second = stage.sample(condition, generators=generators(2), steps=1)
        return float((first - second).abs().mean())

    assert difference(scale_input=True) < 0.05 * difference()


def test_a_scaled_input_is_the_same_in_training_and_sampling():
    stage, inputs = upsampler(residual=True, scale_input=True), []
    stage.network.conv_in.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    zeros, low_res = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 8, 8)
    torch.manual_seed(0)
    stage.loss({"image": zeros, "low_res": low_res})
    torch.manual_seed(0)
    noise = torch.randn(2, 3, 32, 32)
    t = stage.diffusion.sample_timesteps(2, noise.device)
    alpha_bar = stage.diffusion.alpha_bar[t].float().reshape(2, 1, 1, 1)
    expected = F.pixel_unshuffle((alpha_bar * (1 - alpha_bar)).sqrt() * noise, stage.network.patch)
    torch.testing.assert_close(inputs[0][:, : expected.shape[1]], expected)
    x_t = stage.diffusion.add_noise(zeros, noise, t)
    whole = stage.network(alpha_bar.sqrt() * x_t, t, concat=zeros)
    torch.testing.assert_close(stage.bind({"low_res": low_res})(x_t, t), whole)


@pytest.mark.parametrize(("t", "scale"), [(299, 1.0), (300, 3.0), (800, 3.0), (801, 1.0)])
def test_a_decoder_is_guided_only_inside_its_interval(t, scale):
    stage, everywhere = (
        randomized(decoder(guidance_scale=3.0, guidance_interval=interval))
        for interval in ([300, 800], None)
    )
    everywhere.load_state_dict(stage.state_dict())
    batch, x_t = embedded_batch(2), torch.randn(2, 3, 8, 8)
    condition = stage.condition(batch)
    found = stage.denoiser(condition)(x_t, t).x0
    torch.testing.assert_close(found, everywhere.denoiser(condition, scale)(x_t, t).x0)
    other = everywhere.denoiser(condition, 4.0 - scale)(x_t, t).x0
    assert not torch.allclose(found, other)


def test_an_upsampler_takes_any_size_but_no_guidance_scale(generators):
    stage, options = upsampler(), {"generators": generators(1)}
    assert stage.sample({"low_res": torch.zeros(1, 3, 4, 6)}, **options).shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="no caption to guide by"):
        stage.sample({"low_res": torch.zeros(1, 3, 4, 4)}, **options, guidance_scale=2)


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_gradients_have_the_strides_of_their_parameters(name):
    """Otherwise DDP copies them at each step."""
    stage = tiny_bundle.stage(name).to(memory_format=torch.channels_last).train()
    batch = {
        "image": torch.rand(4, 3, 64, 64).to(memory_format=torch.channels_last),
        "image_embedding": torch.randn(4, tiny_bundle.EMBEDDING_DIM),
        "text_embedding": torch.randn(4, tiny_bundle.EMBEDDING_DIM),
        "text_states": torch.randn(4, tiny_bundle.CONTEXT_LENGTH, tiny_bundle.TEXT_WIDTH),
        "text_mask": torch.ones(4, tiny_bundle.CONTEXT_LENGTH, dtype=torch.bool),
    }
    stage.loss(batch)["loss"].backward()
    states = stage.null_text.states
    assert states.grad is not None and states.grad.stride() == states.stride()


def test_the_error_of_each_quarter_is_the_mean_over_its_timesteps():
    stage = tiny_bundle.stage("upsampler_256")
    noised = stage._noised(torch.rand(6, 3, 8, 8))
    noised = noised._replace(t=torch.tensor([0, 249, 250, 251, 999, 998]))
    output = torch.randn_like(noised.x0)
    mse = stage.diffusion.loss(output, *noised)["mse"]
    losses = stage._losses(output, noised)
    expected = {"q0": mse[:2], "q1": mse[2:4], "q3": mse[4:]}
    for name, values in expected.items():
        torch.testing.assert_close(losses[f"loss_{name}"], values.mean())
    assert losses["loss_q2"].isnan()  # no timestep is in it
