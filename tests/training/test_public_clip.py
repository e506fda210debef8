"""A bundle that is trained with a public CLIP has that CLIP, so it can be sampled and evaluated."""

import json

import open_clip
import pytest
import script
import tiny_public
import torch
from tiny_shards import write_shards

from unclip.clip import load_public
from unclip.interop import write_public_clip
from unclip.training.run import public_embedder

CAPTIONS = ["a red apple", "one two three four five six seven eight nine"]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    return tiny_public.write_weights(tmp_path, monkeypatch)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_bundles_clip_has_the_features_of_the_public_one(weights, tmp_path, normalize):
    public = load_public("tiny-test", weights, normalize=normalize)
    path = tmp_path / "models" / "clip.safetensors"
    embedder = public_embedder(path, "tiny-test", str(weights), normalize=normalize)
    for ours, theirs in zip(embedder.text(CAPTIONS), public.text(CAPTIONS), strict=True):
        assert torch.equal(ours, theirs)
    image = torch.rand(2, 3, 40, 40) * 2 - 1
    assert torch.equal(embedder.image(image), public.image(image))
    weights.unlink()  # the bundle is complete
    again = public_embedder(path, "tiny-test", str(weights), normalize=normalize)
    assert again.fingerprint == embedder.fingerprint


def test_a_tags_activation_and_normalization_are_stored(weights, tmp_path, monkeypatch):
    tag = {"hf_hub": "x/", "mean": (0.1, 0.2, 0.3), "std": (0.5, 1, 1), "quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag_name: tag)
    monkeypatch.setattr("unclip.clip.public._fetch", lambda *_: weights)
    public = load_public("tiny-test", "tag")
    embedder = public_embedder(tmp_path / "clip.safetensors", "tiny-test", "tag")
    assert (embedder.image_mean, embedder.image_std) == ((0.1, 0.2, 0.3), (0.5, 1, 1))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(embedder.image(image), public.image(image))


def test_another_clip_of_the_bundle_is_not_replaced(weights, tmp_path):
    path = tmp_path / "clip.safetensors"
    write_public_clip(path, "tiny-test", weights)
    with pytest.raises(ValueError, match=r"ViT-B-32 openai but tiny-test open_clip_model\.safet"):
        public_embedder(path, "ViT-B-32", "openai")


def test_a_clip_that_a_bundle_cannot_have_is_an_error(weights, tmp_path):
    (tmp_path / "odd.json").write_text(
        json.dumps(tiny_public.SETTINGS | {"custom_text": True, "embed_dim": 16})
    )
    open_clip.add_model_config(tmp_path / "odd.json")
    model = open_clip.create_model("odd", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd cannot be stored in a bundle.*no custom_text"):
        write_public_clip(tmp_path / "clip.safetensors", "odd", tmp_path / "odd.pt")


@pytest.mark.slow
def test_a_bundle_with_a_public_clip_is_trained_sampled_and_evaluated(weights, tmp_path):
    write_shards(tmp_path / "shards", sizes=(64, 256), images=8, shards=1)
    common = (
        "scale=quick data=folder data.root=shards bundle=coco trainer.accelerator=cpu "
        "embedder=public embedder.build.name=tiny-test clip.shard_size=256 "
        f"embedder.build.pretrained={weights} clip.embedding_dim=16 clip.text_width=16 "
        "clip.context_length=9"
    )
    steps = "trainer.max_steps=1 trainer.limit_val_batches=1 data.batch_size=4"
    script.run(f"python src/embed.py {common}", tmp_path)
    weights.unlink()
    for stage in ("prior", "decoder"):
        script.run(f"python src/train.py stage={stage} {common} {steps}", tmp_path)
    sampled = "python src/sample.py 'a red square' --model models/coco --out made --size 64"
    script.run(f"{sampled} --steps prior=1 decoder=1", tmp_path)
    assert len(list((tmp_path / "made").glob("*.png"))) == 1
    script.run(
        "python src/evaluate.py model=models/coco data=folder data.root=shards measure=quick "
        "device=cpu protocol.count=4 only=[frechet,prior,samples]",
        tmp_path,
    )
    found = json.loads((tmp_path / "models" / "coco" / "results.json").read_text())
    card = (tmp_path / "models" / "coco" / "MODEL_CARD.md").read_text()
    assert "The CLIP is the public tiny-test open_clip_model.safetensors of open_clip" in card
    assert found["scores"]["fd_effnet_lite0"]["n"] == 4
    assert found["not_available"] == {}
    assert list(found["prior"]) == ["val"]
    assert (tmp_path / "models" / "coco" / "images" / "val_64.png").is_file()
