import pytest
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torchvision.transforms.v2.functional import normalize

from unclip.clip import ClipEmbedder, Tokenizer, build_clip, fit_vocabulary

CAPTIONS = ["a red apple", "two dogs", "a red apple", ""]


def _embedder(**settings):
    model = build_clip(
        embed_dim=20,
        vision={"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        text={"context_length": 12, "vocab_size": 540, "width": 24, "heads": 2, "layers": 1},
    )
    tokenizer = Tokenizer(12, fit_vocabulary(CAPTIONS, 540))
    colors = {"image_mean": OPENAI_DATASET_MEAN, "image_std": OPENAI_DATASET_STD}
    return ClipEmbedder(model, tokenizer, **colors, fingerprint="0" * 16, **settings)


@pytest.fixture
def embedder():
    return _embedder()


def test_it_is_frozen_has_its_models_sizes_and_moves_only_if_it_has_to(embedder, monkeypatch):
    sizes = (embedder.embedding_dim, embedder.text_width, embedder.context_length)
    assert sizes == (20, 24, 12) and embedder.image_size == 32
    assert not embedder.model.training
    assert not any(p.requires_grad for p in embedder.model.parameters())
    monkeypatch.setattr(embedder.model, "to", pytest.fail)
    assert embedder.to("cpu") is embedder


@pytest.mark.parametrize("normalized", [True, False])
def test_features_equal_open_clips(normalized):
    embedder = _embedder(normalize=normalized)
    features = embedder.text(CAPTIONS)
    expected = embedder.model.encode_text(embedder.tokenizer(CAPTIONS).tokens, normalize=normalized)
    torch.testing.assert_close(features.text_embedding, expected)
    assert features.text_states.shape == (4, 12, 24)
    assert features.text_mask.dtype == torch.bool and features.tokens.dtype == torch.int64
    image = torch.rand(3, 3, 32, 32)
    expected = embedder.model.encode_image(
        normalize(image, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD), normalize=normalized
    )
    torch.testing.assert_close(embedder.image(image * 2 - 1), expected)


def test_cached_features_equal_fresh_ones(embedder, monkeypatch):
    fresh = embedder._encode_text(CAPTIONS)
    first = embedder.text(CAPTIONS)
    encoded, encode = [], embedder._encode_text
    monkeypatch.setattr(embedder, "_encode_text", lambda new: encoded.append(new) or encode(new))
    second = embedder.text([*reversed(CAPTIONS), "three cats"])
    assert encoded == [["three cats"]]
    for a, b, c in zip(fresh, first, second, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(b, c[:4].flip(0))


def test_the_cache_drops_the_least_recent_captions(embedder):
    embedder._cache_size = 2
    features = embedder.text(["a", "b", "c"]).text_embedding
    assert list(embedder._cache) == ["b", "c"]
    embedder.text(["b"])
    embedder.text(["d"])
    assert list(embedder._cache) == ["b", "d"]
    torch.testing.assert_close(features, embedder.text(["a", "b", "c"]).text_embedding)


def test_features_cached_in_inference_mode_can_be_trained_on(embedder):
    with torch.inference_mode():
        embedder.text(["a red apple"])
        embedder.image(torch.zeros(1, 3, 32, 32))
    states = embedder.text(["a red apple"]).text_states
    weight = torch.ones(24, requires_grad=True)
    (states @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, states.sum((0, 1)))


def test_autocast_does_not_change_the_features(embedder):
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = (embedder._encode_text(CAPTIONS).text_states, embedder.image(image))
    assert all(part.dtype == torch.float32 for part in inside)
    assert torch.equal(inside[0], embedder._encode_text(CAPTIONS).text_states)
    assert torch.equal(inside[1], embedder.image(image))


def test_a_half_precision_model_has_float32_outputs(embedder):
    half = _embedder(dtype=torch.bfloat16)
    half.model.load_state_dict(embedder.model.state_dict())
    features, image = half.text(CAPTIONS), half.image(torch.rand(2, 3, 32, 32))
    parts = (features.text_states, features.text_embedding, image)
    assert {part.dtype for part in parts} == {torch.float32}
    exact = embedder.text(CAPTIONS).text_embedding
    assert F.cosine_similarity(features.text_embedding, exact).min() > 0.99


def test_a_copy_of_a_batch_gets_the_features(embedder):
    image = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    batch = {"caption": CAPTIONS, "image": image, "low_res": image[..., ::4, ::4]}
    embedded = embedder(batch)
    assert batch.keys() == {"caption", "image", "low_res"} and batch["image"] is image
    added = {"tokens", "text_states", "text_mask", "text_embedding", "image_embedding"}
    assert embedded.keys() == batch.keys() | added
    assert embedded["image"] is image and embedded["low_res"] is batch["low_res"]
    torch.testing.assert_close(embedded["image_embedding"], embedder.image(image))


def test_a_stored_image_embedding_is_kept(embedder, monkeypatch):
    monkeypatch.setattr(embedder, "image", None)
    stored = torch.randn(4, 20).half()
    embedded = embedder({"caption": CAPTIONS, "image_embedding": stored})
    assert torch.equal(embedded["image_embedding"], stored.float())
    assert "image_embedding" not in embedder({"caption": CAPTIONS})
