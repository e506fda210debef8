import math

import pytest
import torch
import torch.nn.functional as F
from random_weights import without_gradient
from tiny_stages import train

from unclip.clip import Tokenizer, fit_vocabulary, recall_at
from unclip.stages.clip import ClipStage

SIZES = {"embed_dim": 24, "image_size": 32, "patch_size": 16, "context_length": 20}
SIZES |= {"vision_width": 32, "vision_layers": 1, "vision_head_width": 16}
SIZES |= {"text_width": 32, "text_layers": 1, "text_heads": 2}
CAPTIONS = [
    f"a {color} {thing}" for color in ("red", "blue", "green", "gray") for thing in ("dog", "cup")
]


def clip_stage(**changes):
    return ClipStage(**({"vocabulary_size": 540} | SIZES | changes))


def graph(output):
    """Returns the names of the functions whose backward `output` needs."""
    names, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in names:
            names.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return " ".join(node.name() for node in names)


@pytest.fixture
def stage():
    return clip_stage()


@pytest.fixture
def batch():
    return {"caption": CAPTIONS, "image": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)}


@pytest.mark.slow
def test_training_on_eight_pairs_matches_all_of_them(stage, batch):
    stage.fit_statistics([batch])
    assert train(stage, batch, steps=30, lr=3e-3)[-1] < 0.1
    losses, embedder = stage.loss(batch), stage.embedder()
    assert losses["image_to_text"] == losses["text_to_image"] == 1
    text = embedder.text(batch["caption"]).text_embedding
    recall = recall_at(embedder.image(batch["image"]), text, k=(1,), among=8)
    assert recall["image_to_text_at_1"] == recall["text_to_image_at_1"] == 1


def test_the_loss_is_the_cross_entropy_of_the_embedders_cosines(stage, batch):
    stage.eval()
    embedder = stage.embedder()
    image, text = embedder.image(batch["image"]), embedder.text(batch["caption"]).text_embedding
    logits = stage.model.logit_scale.exp() * image @ text.T
    own = torch.arange(8)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    losses = stage.loss(batch)
    torch.testing.assert_close(losses["loss"], expected)
    assert losses["image_to_text"] == (logits.argmax(1) == own).float().mean()
    torch.testing.assert_close(losses["logit_scale"], torch.tensor(1 / 0.07))
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


def test_bfloat16_on_a_cpu_only_rounds(stage, batch):
    exact = stage.loss(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage.loss(batch)["loss"]
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    assert "ScaledDotProduct" not in graph(loss)  # the fused attention has a slow backward


@pytest.mark.parametrize(
    "changes", [{}, {"vocabulary_size": None}, {"vision_layers": [1, 1, 1, 1]}]
)
def test_the_loss_reaches_every_parameter(changes, batch):
    stage = clip_stage(**changes)
    stage.loss(batch)["loss"].backward()
    assert without_gradient(stage) == []


def test_the_logit_scale_is_at_most_a_hundred_in_training(stage, batch):
    torch.nn.init.constant_(stage.model.logit_scale, 9.0)
    assert stage.eval().loss(batch)["logit_scale"] > 1000
    losses = stage.train().loss(batch)
    torch.testing.assert_close(losses["logit_scale"], torch.tensor(100.0))
    losses["loss"].backward()
    assert stage.model.logit_scale.grad != 0  # so that it can decrease again
    assert stage.model.logit_scale.item() == pytest.approx(math.log(100))


def test_the_vocabulary_is_fitted_to_all_captions_and_saved_with_the_weights(stage):
    stage.fit_statistics([{"caption": ["a red dog", "a dog"]}, {"caption": ["a blue cup"]}])
    assert stage.vocabulary.dtype == torch.int64
    assert stage.vocabulary.tolist() == fit_vocabulary(["a red dog", "a dog", "a blue cup"], 540)
    other = clip_stage()
    before = other.tokenizer(CAPTIONS).tokens
    other.load_state_dict(stage.state_dict())
    after = other.tokenizer(CAPTIONS).tokens
    assert torch.equal(after, stage.tokenizer(CAPTIONS).tokens)
    assert not torch.equal(after, before)
    torch.testing.assert_close(
        other.embedder().text(CAPTIONS).text_embedding,
        stage.embedder().text(CAPTIONS).text_embedding,
    )


def test_the_tokenizer_follows_a_vocabulary_that_rank_0_broadcasts(stage):
    other = clip_stage()
    other.fit_vocabulary(CAPTIONS)
    stage.tokenizer(CAPTIONS)
    stage.vocabulary.copy_(other.vocabulary)
    assert torch.equal(stage.tokenizer(CAPTIONS).tokens, other.tokenizer(CAPTIONS).tokens)


def test_clips_whole_vocabulary_is_not_fitted(batch):
    stage = clip_stage(vocabulary_size=None)
    stage.fit_statistics([batch])
    assert "vocabulary" not in stage.state_dict()
    assert torch.equal(stage.tokenizer(CAPTIONS).tokens, Tokenizer(20)(CAPTIONS).tokens)
    assert stage.model.token_embedding.num_embeddings == 49408


def test_the_embedder_is_a_frozen_copy(stage, batch):
    embedder = stage.embedder()
    before = embedder.image(batch["image"])
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.1)
    assert torch.equal(embedder.image(batch["image"]), before)
    assert stage.training and all(p.requires_grad for p in stage.parameters())
    assert stage.embedder().fingerprint != embedder.fingerprint


def test_the_vocabulary_is_read_from_the_device_once(stage, monkeypatch):
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    for _ in range(3):
        tokenizer = stage.tokenizer
    assert len(reads) == 1 and stage.tokenizer is tokenizer
    stage.fit_vocabulary(CAPTIONS)
    assert stage.tokenizer is not tokenizer


def test_only_the_first_batches_are_read_for_the_vocabulary(stage, monkeypatch):
    monkeypatch.setattr("unclip.stages.clip.CAPTION_BATCHES", 2)
    batches = iter([{"caption": ["a dog"]}] * 3)
    stage.fit_statistics(batches)
    assert len(list(batches)) == 1
