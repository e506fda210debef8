"""Scores and previews of each stage's module, on untrained stages."""

import functools

import pytest
import torch
import torch.nn.functional as F

from unclip.diffusion import GaussianDiffusion, ddim
from unclip.networks import ARTransformer, PriorTransformer, UNet
from unclip.stages import (
    AutoregressivePriorStage,
    ClipStage,
    DecoderStage,
    PriorStage,
    UpsamplerStage,
)
from unclip.training import optim
from unclip.training.modules import (
    AutoregressivePriorModule,
    ClipModule,
    DecoderModule,
    PriorModule,
    UpsamplerModule,
)

DIM, WIDTH, LENGTH = 8, 16, 6
SAMPLER = functools.partial(ddim, steps=2)
DIFFUSION = GaussianDiffusion(prediction="x0")
TRAINING = {
    "recipe": {},
    "optimizer": functools.partial(torch.optim.AdamW, lr=1e-3),
    "schedule": optim.warmup_stable_decay,
}


class FakeEmbedder:
    """Features without a network."""

    fingerprint = "0123456789abcdef"

    def to(self, device):
        return self

    def __call__(self, batch):
        count = len(batch["caption"])
        states = torch.randn(count, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))
        batch = dict(batch)
        batch["text_states"] = states
        batch["text_mask"] = torch.ones(count, LENGTH, dtype=torch.bool)
        batch["text_embedding"] = F.normalize(states[:, 0, :DIM], dim=1)
        if "image_embedding" not in batch:
            batch["image_embedding"] = F.normalize(states[:, 1, :DIM], dim=1)
        return batch


def batch_of(count=4, size=16):
    generator = torch.Generator().manual_seed(2)
    shape = (count, 3, size, size)
    return {
        "key": [f"{index:08d}" for index in range(count)],
        "caption": ["an image"] * count,
        "image": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        "valid": torch.ones(count, dtype=torch.bool),
    }


def test_preprocessing_converts_images_and_the_embedder_is_not_a_submodule():
    network = UNet(channels=8, multipliers=[1], blocks=1, groups=4, in_channels=6)
    stage = UpsamplerStage(network, DIFFUSION, SAMPLER, name="upsampler_256")
    module = UpsamplerModule(stage, embedder=FakeEmbedder(), **TRAINING)
    batch = batch_of()
    batch["low_res"] = batch["image"][..., ::4, ::4]
    prepared = module.preprocess(batch)
    assert prepared["image"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(prepared["image"], batch["image"] / 127.5 - 1)
    assert prepared["low_res"].amin() >= -1
    assert batch["image"].dtype == torch.uint8
    assert all(name.startswith("stage.") for name in module.state_dict())


def test_a_stage_that_needs_clip_requires_an_embedder():
    with pytest.raises(ValueError, match="embedder"):
        DecoderModule(decoder(), **TRAINING)


def test_a_perfect_prior_has_cosine_one():
    network = PriorTransformer(
        embedding_dim=DIM, text_width=WIDTH, context_length=LENGTH, width=16, layers=1, heads=2
    )
    stage = PriorStage(network, DIFFUSION, SAMPLER, text_width=WIDTH).eval()
    module = PriorModule(stage, embedder=FakeEmbedder(), **TRAINING)
    batch = module.preprocess(batch_of())
    measured = module.measure(batch)
    assert measured.keys() == {"cosine", "cosine_text", "cosine_shuffled"}
    truth = batch["image_embedding"]
    stage.sample = lambda condition, generators: truth
    measured = module.measure(batch)
    assert measured["cosine"] == pytest.approx(1.0)
    expected = F.cosine_similarity(truth.roll(1, 0), truth).mean()
    torch.testing.assert_close(measured["cosine_shuffled"], expected)


def test_a_prior_is_compared_with_the_linear_prior_and_its_codes():
    network = ARTransformer(
        embedding_dim=DIM,
        text_width=WIDTH,
        context_length=LENGTH,
        components=DIM,
        buckets=64,
        width=16,
        layers=1,
        heads=2,
    )
    stage = AutoregressivePriorStage(network, text_width=WIDTH).eval()
    module = AutoregressivePriorModule(stage, embedder=FakeEmbedder(), **TRAINING)
    batch = module.preprocess(batch_of(200))
    batch["image_embedding"] = batch["text_embedding"].flip(1)
    stage.fit_statistics([batch])
    measured = module.measure(batch)
    assert measured["cosine_linear"] > 0.98
    assert measured["cosine_codes"] > 0.98
    assert abs(measured["cosine"]) < 0.2 and abs(measured["cosine_text"]) < 0.2


def decoder():
    network = UNet(
        channels=8,
        multipliers=[1],
        blocks=1,
        groups=4,
        conditioning={"image_embedding": DIM, "text_states": WIDTH, "context_width": 8},
    )
    settings = {"embedding_dim": DIM, "text_width": WIDTH, "image_size": 16}
    return DecoderStage(network, DIFFUSION, SAMPLER, **settings)


def test_a_preview_does_not_depend_on_the_batch():
    module = DecoderModule(decoder().eval(), embedder=FakeEmbedder(), **TRAINING)
    batch = module.preprocess(batch_of())
    rows = module.preview(batch)
    assert rows.keys() == {"real", "decoded"}
    few = {name: value[:2] for name, value in batch.items()}
    torch.testing.assert_close(module.preview(few)["decoded"], rows["decoded"][:2])


def test_an_upsampler_that_adds_nothing_gains_nothing():
    network = UNet(channels=8, multipliers=[1], blocks=1, groups=4, in_channels=6)
    settings = {"name": "upsampler_256", "residual": True}
    stage = UpsamplerStage(network, DIFFUSION, SAMPLER, **settings).eval()
    module = UpsamplerModule(stage, **TRAINING)
    batch = batch_of()
    batch = module.preprocess(batch | {"low_res": batch["image"][..., ::4, ::4]})
    measured = module.measure(batch)  # the last convolution is zero, so x0 is the enlarged image
    assert measured["psnr_gain"] == pytest.approx(0.0, abs=1e-4)
    assert module.preview(batch).keys() == {"bicubic", "upsampled", "real"}


def test_clip_is_validated_by_retrieval_over_all_batches_without_a_copy(kit, monkeypatch):
    monkeypatch.setattr(ClipStage, "embedder", pytest.fail)  # it copies and hashes the weights
    stage = ClipStage(
        embed_dim=8,
        image_size=4,
        patch_size=4,
        vision_width=64,
        vision_layers=1,
        text_width=16,
        text_layers=1,
        text_heads=1,
        context_length=8,
        vocabulary_size=600,
    )
    module = ClipModule(stage, num_candidates=6, **TRAINING)
    trainer = kit.trainer(1, loggers=[], validate_every_steps=1)
    trainer.fit(module, kit.ImageData())
    metrics = trainer.callback_metrics
    assert metrics["validation/num_candidates"] == 6
    assert 0 <= metrics["validation/text_to_image_at_1"] <= metrics["validation/text_to_image_at_5"]
    assert stage.tokenizer(["an image"]).tokens.unique().numel() > 3  # the vocabulary was fitted
