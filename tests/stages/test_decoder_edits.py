import pytest
import tiny_bundle
import torch

from unclip.clip.embedder import TextFeatures
from unclip.stages import decoder_edits as editing


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    return tiny_bundle.stage("decoder").eval()


def smooth(stage):
    """The tiny decoder with an exact denoiser in its network's place: data N(0.2, 0.3²)."""
    diffusion = stage.diffusion

    class Exact(torch.nn.Module):
        def bind(self, **condition):
            return self

        def forward(self, x_t, t):
            alpha_bar = diffusion.alpha_bar[t].float().reshape(-1, 1, 1, 1)
            gain = alpha_bar.sqrt() * 0.09 / (alpha_bar * 0.09 + 1 - alpha_bar)
            return 0.2 + gain * (x_t - alpha_bar.sqrt() * 0.2)

    exact = tiny_bundle.stage("decoder").eval()
    exact.network = Exact()
    return exact


def clip_features(rows):
    states = torch.randn(rows, tiny_bundle.CONTEXT_LENGTH, tiny_bundle.TEXT_WIDTH)
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    text = TextFeatures(None, states, mask, torch.randn(rows, tiny_bundle.EMBEDDING_DIM))
    return {"image_embedding": torch.randn(rows, tiny_bundle.EMBEDDING_DIM), **text._asdict()}


def condition(stage, rows):
    return stage.condition(clip_features(rows))


def test_timesteps_end_above_zero(stage):
    assert editing.timesteps(stage.diffusion, 4) == [999, 699, 400, 100]
    assert editing.timesteps(stage.diffusion, 1) == [999]
    assert editing.timesteps(stage.diffusion, 900) == list(range(999, 99, -1))
    with pytest.raises(ValueError, match="steps of the decoder is 901; it can be 1 to 900"):
        editing.timesteps(stage.diffusion, 901)


def test_the_way_back_is_closer_with_more_steps(stage, generators, monkeypatch):
    exact = smooth(stage)
    image = (0.2 + 0.3 * torch.randn(2, 3, 64, 64)).clamp(-1, 1)
    text = condition(exact, 2)
    errors = {}
    for iterations in (1, 4):
        monkeypatch.setattr(editing, "ITERATIONS", iterations)
        for steps in (5, 10, 20, 40):
            noise = editing.invert(exact, text, image, steps=steps)
            back = editing.render(exact, text, noise, generators=generators(2), steps=steps)
            errors[iterations, steps] = (back - image).square().mean().sqrt().item()
    for iterations in (1, 4):
        falling = [errors[iterations, steps] for steps in (5, 10, 20, 40)]
        assert falling == sorted(falling, reverse=True)
    assert errors[1, 40] < 0.3 * errors[1, 5]
    assert all(errors[4, steps] < errors[1, steps] for steps in (5, 10, 20, 40))


def test_eta_draws_and_zero_does_not(stage, generators):
    text, noise = condition(stage, 2), torch.randn(2, 3, 64, 64)

    def made(eta, seed):
        return editing.render(stage, text, noise, generators=generators(2, seed), eta=eta, steps=3)

    assert torch.equal(made(0.0, 0), made(0.0, 9))
    assert not torch.equal(made(0.5, 0), made(0.5, 9))


def test_completing_keeps_the_rest_to_the_bit(stage, generators):
    image, mask = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    mask[:, :, 10:30] = True
    made = editing.complete(
        stage, condition(stage, 2), image, mask, generators=generators(2), steps=6
    )
    kept = ~mask.expand_as(made)
    assert torch.equal(made[kept], image[kept])
    assert not torch.equal(made, image)


def test_edits_clip_x0_as_the_stage_does(stage, generators, monkeypatch):
    text, image, seeds = condition(stage, 1), torch.rand(1, 3, 64, 64), generators(1)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    given, denoiser = [], stage.diffusion.denoiser
    monkeypatch.setattr(
        stage.diffusion,
        "denoiser",
        lambda network, clip_range: given.append(clip_range) or denoiser(network, clip_range),
    )
    editing.invert(stage, text, image, steps=1)
    editing.render(stage, text, image, generators=seeds, steps=1)
    editing.complete(stage, text, image, mask, generators=seeds, steps=1)
    stage.sample(text, generators=seeds)
    assert given == [1.0] * 4


def test_a_missing_input_is_replaced_by_the_null_of_the_stage(stage):
    batch = clip_features(2)
    full = stage.condition(batch)
    null = stage.null(full)
    no_text = stage.condition({key: batch[key] for key in ("image_embedding", "text_mask")})
    no_image = stage.condition({key: batch[key] for key in batch.keys() - {"image_embedding"}})
    for name in full:
        of_image = name == "image_embedding"
        assert torch.equal(no_text[name], (full if of_image else null)[name])
        assert torch.equal(no_image[name], (null if of_image else full)[name])
