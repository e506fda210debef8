"""Scores and previews of each stage's module, on untrained stages."""

import functools

import pytest
import tiny_bundle
import torch
import torch.nn.functional as F
from tiny_bundle import CONTEXT_LENGTH, EMBEDDING_DIM, TEXT_WIDTH

from unclip import bundle
from unclip.stages import ClipStage
from unclip.training import modules, optim


class FakeEmbedder:
    """Features without a network."""

    fingerprint = "0123456789abcdef"

    def to(self, device):
        return self

    def __call__(self, batch):
        shape = (len(batch["caption"]), CONTEXT_LENGTH, TEXT_WIDTH)
        states = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        text = F.normalize(states[:, 0, :EMBEDDING_DIM], dim=1)
        image = F.normalize(states[:, 1, :EMBEDDING_DIM], dim=1)
        mask = torch.ones(shape[:2], dtype=torch.bool)
        features = {"text_states": states, "text_mask": mask, "text_embedding": text}
        return {"image_embedding": image, **batch, **features}


def module_of(name, cls, embedder=None, network=None, **recipe):
    """Build the module of a tiny stage whose recipe is changed."""
    changed = tiny_bundle.recipe(name) | recipe
    if network:
        changed["network"] |= network
    adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
    training = {"recipe": {}, "optimizer": adamw, "schedule": optim.warmup_stable_decay}
    return cls(bundle.build(changed).eval(), embedder=embedder, **training)


def batch_of(count=4, size=64):
    generator = torch.Generator().manual_seed(2)
    shape = (count, 3, size, size)
    image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return {
        "key": [f"{index:08d}" for index in range(count)],
        "caption": ["an image"] * count,
        "image": image,
        "low_res": image[..., ::4, ::4],
        "valid": torch.ones(count, dtype=torch.bool),
    }


def test_preprocessing_converts_images_and_the_embedder_is_not_a_submodule():
    module = module_of("upsampler_256", modules.UpsamplerModule, FakeEmbedder())
    batch = batch_of()
    prepared = module.preprocess(batch)
    assert prepared["image"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(prepared["image"], batch["image"] / 127.5 - 1)
    assert prepared["low_res"].amin() >= -1
    assert batch["image"].dtype == torch.uint8
    assert all(name.startswith("stage.") for name in module.state_dict())


def test_a_perfect_prior_has_cosine_one(monkeypatch):
    module = module_of("prior", modules.PriorModule, FakeEmbedder())
    batch = module.preprocess(batch_of())
    assert module.measure(batch).keys() == {"cosine", "cosine_text", "cosine_shuffled"}
    truth = batch["image_embedding"]
    monkeypatch.setattr(module.stage, "sample", lambda condition, generators: truth)
    measured = module.measure(batch)
    assert measured["cosine"] == pytest.approx(1.0)
    expected = F.cosine_similarity(truth.roll(1, 0), truth).mean()
    torch.testing.assert_close(measured["cosine_shuffled"], expected)


def test_a_prior_is_compared_with_the_linear_prior_and_its_codes():
    cls = modules.AutoregressivePriorModule
    module = module_of("prior_ar", cls, FakeEmbedder(), network={"buckets": 64}, guidance_scale=1.0)
    batch = module.preprocess(batch_of(200, size=4))
    batch["image_embedding"] = batch["text_embedding"].flip(1)
    module.stage.fit_statistics([batch])
    measured = module.measure(batch)
    assert measured["cosine_linear"] > 0.98
    assert measured["cosine_codes"] > 0.98
    assert abs(measured["cosine"]) < 0.2 and abs(measured["cosine_text"]) < 0.2


def test_a_preview_does_not_depend_on_the_batch():
    module = module_of("decoder", modules.DecoderModule, FakeEmbedder())
    batch = module.preprocess(batch_of())
    rows = module.preview(batch)
    assert rows.keys() == {"real", "decoded"}
    few = {name: value[:2] for name, value in batch.items()}
    torch.testing.assert_close(module.preview(few)["decoded"], rows["decoded"][:2])


def test_an_upsampler_that_adds_nothing_gains_nothing():
    module = module_of("upsampler_256", modules.UpsamplerModule, residual=True)
    batch = module.preprocess(batch_of())
    measured = module.measure(batch)  # the last convolution is zero, so x0 is the enlarged image
    assert measured["psnr_gain"] == pytest.approx(0.0, abs=1e-4)
    assert module.preview(batch).keys() == {"bicubic", "upsampled", "real"}


def test_clip_is_validated_by_retrieval_over_all_batches_without_a_copy(kit, monkeypatch):
    monkeypatch.setattr(ClipStage, "embedder", pytest.fail)  # it copies and hashes the weights
    cls = functools.partial(modules.ClipModule, num_candidates=6)
    module = module_of("clip", cls, image_size=4, patch_size=4)
    _, trainer = kit.fit(1, kit.callbacks()[1], module=module)
    metrics = trainer.callback_metrics
    assert metrics["validation/num_candidates"] == 6
    assert 0 <= metrics["validation/text_to_image_at_1"] <= metrics["validation/text_to_image_at_5"]
    tokens = module.stage.tokenizer(["an image"]).tokens
    assert tokens.unique().numel() > 3  # the vocabulary was fitted
