"""Converted stages compute the same as their components in diffusers and transformers."""

import copy
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from unclip import Cascade, bundle
from unclip.diffusion import randn

CLOSE = {"rtol": 0, "atol": 1e-4}
PROMPTS = ["a red fox", "two very small green houses by the sea"]


@pytest.fixture(scope="module")
def cascade(karlo):
    return Cascade.load(karlo.models, device="cpu")


@pytest.fixture(scope="module")
def text(cascade):
    """Tokens and mask of the prompts, followed by as many empty prompts."""
    return cascade.embedder.tokenizer([*PROMPTS, *[""] * len(PROMPTS)])


@pytest.fixture(scope="module")
def encoded(karlo, text):
    return karlo.parts.text_encoder(text.tokens)


def test_both_towers_of_the_clip_equal_transformers(cascade, karlo, text, encoded):
    features = cascade.embedder.text([*PROMPTS, *[""] * len(PROMPTS)])
    torch.testing.assert_close(features.text_states, encoded.last_hidden_state, **CLOSE)
    torch.testing.assert_close(features.text_embedding, encoded.text_embeds, **CLOSE)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    constants = cascade.embedder.image_mean, cascade.embedder.image_std
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in constants)
    pixels = ((image + 1) / 2 - mean) / std
    expected = karlo.parts.image_encoder(pixels).image_embeds
    torch.testing.assert_close(cascade.embedder.image(image), expected, **CLOSE)


def test_the_last_network_is_used_for_the_last_step_only(cascade):
    stage = cascade.stage("upsampler_256")
    denoise = stage.denoiser({"low_res": torch.zeros(1, 3, 8, 8)})
    x_t, enlarged = torch.randn(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    for t, network in ((999, stage.network), (1, stage.network), (0, stage.last_network)):
        timesteps = torch.tensor([t])
        output = network(x_t, timesteps, concat=enlarged)
        expected = stage.diffusion.predict(output, x_t, timesteps, stage.clip_range)
        torch.testing.assert_close(denoise(x_t, t).x0, expected.x0)


# The steps of diffusers' UnCLIPPipeline, with DDPMScheduler, the one scheduler of diffusers that
# agrees with Karlo's own. At timestep 999, noise is 20,000 times the signal, and guidance is eight
# times that, so the last digit of a float32 would be visible. Therefore networks compute in
# float64, the schedule's table is recomputed in float64, and images start at timestep 950.

TIMESTEPS = {"prior": [999, 666, 333, 0], "decoder": [950, 500, 0], "upsampler_256": [950, 0]}


class Doubled:
    """A component that computes in float64, with float32 inputs and outputs."""

    def __init__(self, part):
        self.part = copy.deepcopy(part).double()

    def __call__(self, *inputs, **named):
        outputs = self.part(*map(double, inputs), **{k: double(v) for k, v in named.items()})
        outputs = outputs if isinstance(outputs, tuple) else outputs.to_tuple()
        return [output.float() for output in outputs if output is not None]


def double(value):
    is_float = torch.is_tensor(value) and value.is_floating_point()
    return value.double() if is_float else value


def scheduler(prediction, variance, clip, timesteps):
    ddpm = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        variance_type=variance,
        clip_sample=True,
        clip_sample_range=clip,
    )
    ddpm.set_timesteps(timesteps=timesteps)
    t = torch.arange(1001, dtype=torch.float64) / 1000
    alpha_bar = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    torch.testing.assert_close(ddpm.betas, betas.float())
    ddpm.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return ddpm


def generators(stage):
    return [torch.Generator().manual_seed(10 * len(stage) + k) for k in range(len(PROMPTS))]


def reference_prior(parts, text, encoded, scale):
    network, noises = Doubled(parts.prior), generators("prior")
    process = scheduler("sample", "fixed_small", 10.0, TIMESTEPS["prior"])
    embedding, states = encoded
    z = randn((16,), noises)
    for t in process.timesteps:
        (output,) = network(
            torch.cat([z, z]),
            timestep=t,
            proj_embedding=embedding,
            encoder_hidden_states=states,
            attention_mask=text.text_mask,
        )
        cond, uncond = output.chunk(2)
        z = process.step(uncond + scale * (cond - uncond), t, z, generator=noises).prev_sample
    return parts.prior.post_process_latents(z)


def reference_decoder(parts, text, encoded, z, scale):
    network, noises = Doubled(parts.decoder), generators("decoder")
    process = scheduler("epsilon", "learned_range", 1.0, TIMESTEPS["decoder"])
    # In the decoder, the unconditional half comes first.
    embedding, states, mask = (part.roll(len(z), 0) for part in (*encoded, text.text_mask))
    context, time = Doubled(parts.text_proj)(
        image_embeddings=z,
        prompt_embeds=embedding,
        text_encoder_hidden_states=states,
        do_classifier_free_guidance=True,
    )
    x = randn((3, 64, 64), noises)
    for t in process.timesteps:
        (output,) = network(
            torch.cat([x, x]),
            t,
            encoder_hidden_states=context,
            class_labels=time,
            attention_mask=F.pad(mask, (4, 0), value=True),
        )
        uncond, cond = output.chunk(2)
        eps = uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3])
        x = process.step(torch.cat([eps, cond[:, 3:]], 1), t, x, generator=noises).prev_sample
    return x.clamp(-1, 1)


def reference_upsampler(parts, image):
    first, last = Doubled(parts.super_res_first), Doubled(parts.super_res_last)
    noises = generators("upsampler")
    process = scheduler("epsilon", "fixed_small", 1.0, TIMESTEPS["upsampler_256"])
    enlarged = F.interpolate(image, size=[256, 256], mode="bicubic", antialias=True)
    x = randn((3, 256, 256), noises)
    for t in process.timesteps:
        network = last if t == process.timesteps[-1] else first
        (output,) = network(torch.cat([x, enlarged], 1), t)
        x = process.step(output, t, x, generator=noises).prev_sample
    return x


def test_the_whole_pipeline_equals_diffusers(karlo, text):
    parts = karlo.parts
    cascade = Cascade.load(karlo.models, device="cpu", dtype=torch.float64)
    for name, timesteps in TIMESTEPS.items():
        stage = cascade.stage(name)
        stage.sampler = partial(stage.sampler, steps=len(timesteps), timestep_spacing=timesteps)
    batch = cascade.embedder.text(PROMPTS)._asdict()
    encoded = Doubled(parts.text_encoder)(text.tokens)

    prior = cascade.stage("prior")
    z = prior.sample(prior.condition(batch), generators=generators("prior"))
    z_expected = reference_prior(parts, text, encoded, scale=4.0)
    torch.testing.assert_close(z, z_expected, **CLOSE)

    decoder = cascade.stage("decoder")
    condition = decoder.condition({**batch, "image_embedding": z})
    image = decoder.sample(condition, generators=generators("decoder"))
    image_expected = reference_decoder(parts, text, encoded, z_expected, scale=8.0)
    torch.testing.assert_close(image, image_expected, **CLOSE)

    upsampler = cascade.stage("upsampler_256")
    large = upsampler.sample({"low_res": image}, generators=generators("upsampler"))
    expected = reference_upsampler(parts, image_expected)
    torch.testing.assert_close(large, expected, **CLOSE)


def test_text_to_image_at_256_pixels(cascade):
    steps = {"prior": 2, "decoder": 2, "upsampler_256": 2}
    images = cascade.text_to_image(PROMPTS, seeds=[0, 1], size=256, steps=steps).images
    assert images[256].shape == (2, 3, 256, 256)
    assert images[256].float().std() > 1


def test_default_settings_are_karlos(cascade):
    prior, decoder, upsampler = (cascade.stage(n) for n in ("prior", "decoder", "upsampler_256"))
    steps = [stage.sampler.keywords["steps"] for stage in (prior, decoder, upsampler)]
    assert steps == [25, 25, 7]
    assert (prior.guidance_scale, decoder.guidance_scale) == (4, 8)
    assert (prior.drop_text, decoder.drop_text, decoder.drop_image_embedding) == (0.2, 0.3, 0.1)
    assert (prior.clip_range, prior.candidates, prior.normalize) == (10, 1, False)
    assert not cascade.embedder.normalize
    assert int(cascade.embedder.tokenizer([""]).tokens[0, -1]) == 0  # padding


def test_stages_name_the_bundles_clip_and_no_training(karlo):
    clip = bundle.read_metadata(bundle.stage_file(karlo.models, "clip")).clip_fingerprint
    for name in ("prior", "decoder"):
        metadata = bundle.read_metadata(bundle.stage_file(karlo.models, name))
        assert metadata.clip_fingerprint == clip
        assert metadata.steps == 0
