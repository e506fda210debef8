from functools import partial

import pytest
import torch
import torch.nn.functional as F

from unclip.diffusion import GaussianDiffusion, LogitNormal, ddim, ddpm, dpm_solver_pp_2m
from unclip.networks import PriorTransformer, TextTransformer, UNet
from unclip.stages import DecoderStage, PriorStage, UpsamplerStage
from unclip.stages.conditioning import Normalizer

D, W, L = 8, 12, 5


def embedded_batch(count: int = 4) -> dict:
    return {
        "key": [f"{k:08d}" for k in range(count)],
        "caption": ["a red apple"] * count,
        "image": torch.rand(count, 3, 8, 8) * 2 - 1,
        "low_res": torch.rand(count, 3, 2, 2) * 2 - 1,
        "image_embedding": torch.nn.functional.normalize(torch.randn(count, D), dim=1),
        "text_embedding": torch.nn.functional.normalize(torch.randn(count, D), dim=1),
        "text_states": torch.randn(count, L, W),
        "text_mask": torch.arange(L)[None].expand(count, -1) < 4,
        "tokens": torch.randint(0, 20, (count, L)),
    }


def text_encoder(layers: int) -> TextTransformer:
    return TextTransformer(vocabulary_size=20, context_length=L, width=W, layers=layers, heads=2)


def reading_prior() -> PriorStage:
    return prior(text_encoder=text_encoder(0))


def reading_decoder() -> DecoderStage:
    return decoder(text_encoder=text_encoder(2))


def prior(**options) -> PriorStage:
    network = PriorTransformer(
        embedding_dim=D, text_width=W, context_length=L, width=16, layers=2, heads=2
    )
    return PriorStage(
        network,
        GaussianDiffusion(prediction="x0"),
        partial(ddim, steps=4),
        text_width=W,
        **options,
    )


def unet(**options) -> UNet:
    return UNet(channels=16, multipliers=[1, 2], blocks=1, head_width=8, groups=8, **options)


def decoder(**options) -> DecoderStage:
    network = unet(
        conditioning=dict(image_embedding=D, text_states=W, context_width=16),
        attention_levels=[1],
        out_channels=6,
    )
    return DecoderStage(
        network,
        GaussianDiffusion(prediction="x0", variance="learned_range"),
        partial(dpm_solver_pp_2m, steps=4),
        embedding_dim=D,
        text_width=W,
        image_size=8,
        **options,
    )


def mapped_decoder() -> DecoderStage:
    network = unet(
        conditioning=dict(image_embedding=D, text_states=W, context_width=16),
        attention_levels=[0, 1],
        feature_maps=dict(levels=[0, 1], hidden=8, rank=3, image_size=8),
    )
    return DecoderStage(
        network,
        GaussianDiffusion(prediction="x0", timestep_density=LogitNormal(mean=0.6, std=1.0)),
        partial(ddim, steps=3),
        embedding_dim=D,
        text_width=W,
        image_size=8,
    )


def upsampler(**options) -> UpsamplerStage:
    return UpsamplerStage(
        unet(in_channels=6),
        GaussianDiffusion(prediction="x0"),
        partial(ddim, steps=3),
        name="upsampler_256",
        **options,
    )


STAGES = [prior, reading_prior, decoder, reading_decoder, mapped_decoder, upsampler]


def shaken(stage):
    """Random weights everywhere, so that zero-initialised branches take part."""
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return stage.eval()


@pytest.mark.parametrize("make", STAGES)
def test_loss_is_a_scalar_and_reaches_every_parameter(make):
    """Both branches of every drop stay in the graph, or DDP would wait for a missing gradient."""
    stage = shaken(make())
    losses = stage.loss(embedded_batch())
    assert losses["loss"].shape == ()
    assert all(not value.requires_grad for name, value in losses.items() if name != "loss")
    losses["loss"].backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("make", STAGES)
def test_a_sample_does_not_depend_on_its_batch(make, generators):
    stage, batch = shaken(make()), embedded_batch()
    condition = stage.condition(batch)
    together = stage.sample(condition, generators=generators(4))
    for k in range(4):
        row = {name: value[k : k + 1] for name, value in condition.items()}
        alone = stage.sample(row, generators=generators(1, first_seed=k))
        torch.testing.assert_close(alone[0], together[k], atol=1e-5, rtol=1e-4)


def test_guidance_extrapolates_and_leaves_scale_one_alone(generators):
    """With one evaluation the sample is x0 itself, where guidance is linear in the scale."""
    stage = shaken(decoder())
    condition = stage.condition(embedded_batch(2))
    null = stage.null(condition)

    stage.clip_range = None  # clipping is not linear

    def sample(given, scale):
        return stage.sample(given, generators=generators(2), guidance_scale=scale, steps=1)

    cond, uncond = sample(condition, 1), sample(null, 1)
    torch.testing.assert_close(sample(condition, 3.0), uncond + 3 * (cond - uncond))


def test_prior_keeps_the_candidate_nearest_to_the_text(generators):
    stage, batch, seen = shaken(prior(candidates=6)), embedded_batch(), []
    kept = stage.sample(
        stage.condition(batch),
        generators=generators(4),
        callback=lambda step, steps, x0: seen.append(x0),
    )
    torch.testing.assert_close(kept.norm(dim=1), torch.ones(4))
    candidates = torch.nn.functional.normalize(stage.image_scaling.denormalize(seen[-1]), dim=2)
    products = (candidates * batch["text_embedding"][:, None]).sum(2)
    torch.testing.assert_close((kept * batch["text_embedding"]).sum(1), products.amax(1))
    assert (products.std(dim=1) > 0).all()


def test_prior_fits_a_linear_map_where_it_is_to_have_one():
    stage, batch = prior(linear_baseline=True), embedded_batch(400)
    batch["image_embedding"] = batch["text_embedding"].flip(1)
    stage.fit_statistics([batch])
    predicted = stage.linear(stage.condition(batch)["text_embedding"])
    torch.testing.assert_close(predicted, batch["image_embedding"], atol=0.05, rtol=0)
    assert prior().linear is None


def test_prior_s_null_drops_the_text_alone():
    stage = prior()
    condition = stage.condition(embedded_batch())
    assert set(stage.null(condition)) == {"text_states", "text_mask", "text_embedding"}
    assert (stage.null(condition)["text_mask"].sum(1) == 2).all()


@pytest.mark.parametrize(("make", "rates"), [(decoder, (0.1, 0.5))])
def test_drop_rates(make, rates):
    stage, batch = make(), embedded_batch(4000)
    with torch.no_grad():
        stage.null_image_embedding.fill_(100.0)
        stage.null_text.embedding.fill_(100.0)
    condition = stage._dropped(stage.condition(batch))
    image = (condition["image_embedding"] == 100).all(1).float()
    text = (condition["text_embedding"] == 100).all(1).float()
    assert image.mean().item() == pytest.approx(rates[0], abs=0.02)
    assert text.mean().item() == pytest.approx(rates[1], abs=0.03)
    assert (image * text).mean().item() == pytest.approx(rates[0] * rates[1], abs=0.015)
    assert (condition["text_mask"].sum(1) == torch.where(text.bool(), 2, 4)).all()


def test_standardise_fits_and_inverts():
    z = torch.randn(1000, D) * torch.arange(1, D + 1) + 3
    scaling = Normalizer(D, "statistics")
    scaling.fit(z)
    torch.testing.assert_close(scaling(z).mean(0), torch.zeros(D), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaling(z).std(0), torch.ones(D))
    torch.testing.assert_close(scaling.denormalize(scaling(z)), z)


def test_the_paper_s_scaling_is_17_2_at_1024_dimensions():
    z = torch.randn(2, 1024)
    torch.testing.assert_close(Normalizer(1024, "paper")(z), 17.2 * z)


def test_a_residual_upsampler_starts_as_bicubic(generators):
    stage, batch = upsampler(residual=True), embedded_batch()
    out = stage.sample(stage.condition(batch), generators=generators(4))
    torch.testing.assert_close(out, stage.enlarge(batch["low_res"]))


def test_a_scaled_input_takes_the_noise_out_of_one_step(generators):
    def spread(**options) -> float:
        torch.manual_seed(0)
        stage = shaken(upsampler(residual=True, **options))
        condition = {"low_res": torch.rand(1, 3, 8, 8).mul(2).sub(1).expand(2, -1, -1, -1)}
        first, second = stage.sample(condition, generators=generators(2), steps=1)
        return float((first - second).abs().mean())

    assert spread(scale_input=True) < 0.05 * spread()


def test_a_scaled_input_is_the_same_in_training_and_sampling(generators):
    stage, seen = upsampler(residual=True, scale_input=True), []
    stage.network.conv_in.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    torch.manual_seed(0)
    stage.loss({"image": torch.zeros(2, 3, 32, 32), "low_res": torch.zeros(2, 3, 8, 8)})
    torch.manual_seed(0)
    noise = torch.randn(2, 3, 32, 32)
    t = stage.diffusion.sample_timesteps(2, noise.device)
    alpha_bar = stage.diffusion.alpha_bar[t].float().reshape(2, 1, 1, 1)
    expected = F.pixel_unshuffle((alpha_bar * (1 - alpha_bar)).sqrt() * noise, stage.network.patch)
    torch.testing.assert_close(seen[0][:, : expected.shape[1]], expected)
    prepared = stage.bind({"low_res": torch.zeros(2, 3, 8, 8)})
    x_t = stage.diffusion.add_noise(torch.zeros_like(noise), noise, t)
    whole = stage.network(alpha_bar.sqrt() * x_t, t, concat=torch.zeros_like(noise))
    torch.testing.assert_close(prepared(x_t, t), whole)


def test_an_upsampler_takes_any_size_and_no_guidance(generators):
    stage = upsampler()
    out = stage.sample({"low_res": torch.zeros(1, 3, 4, 6)}, generators=generators(1))
    assert out.shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="no caption to guide by"):
        stage.sample(
            {"low_res": torch.zeros(1, 3, 4, 4)}, generators=generators(1), guidance_scale=2
        )


@pytest.mark.parametrize("make", STAGES)
def test_overfits_one_batch(make, generators):
    """A few steps on one batch lower the loss by more than half."""
    stage, batch = make(), embedded_batch()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = stage.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:5]) / 5


def test_an_analytic_prior_learns_its_error_from_the_trained_network(generators):
    """Of one that says 0 it is the mean square of what there was to say."""
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
    assert (error / expected - 1).abs().max() < 0.5  # a timestep's own is that of a few samples
    stage.sampler = partial(ddpm, steps=10)
    z = stage.sample(stage.condition(embedded_batch()), generators=generators(4))
    assert z.isfinite().all()
