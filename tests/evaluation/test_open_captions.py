"""The spread of open captions is known for samplers whose images are known."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("resvg_py")

from emoji_renders import drawn, rendered

from unclip.emoji import BACKGROUNDS
from unclip.emoji.catalog import is_cell_held_out
from unclip.emoji.scenes import Item, Scene
from unclip.emoji.templates import Templates
from unclip.evaluation.emoji_scenes import choose_captions, measure_open

SEEDS = 3


class KnownSampling:
    """A prior whose embeddings of a caption are orthogonal, next to one that has only one."""

    def __init__(self, captions, broken=()):
        self.cascade = SimpleNamespace(embedder=SimpleNamespace(image=self.embed))
        self.objects = {caption.text: caption for caption in captions}
        self.broken = broken

    def embed(self, images):
        return torch.ones(len(images), SEEDS)

    def predict(self, texts, *, prior):
        sampled = torch.eye(SEEDS).repeat(len(texts) // SEEDS, 1)
        return sampled if prior == "diffusion" else torch.ones_like(sampled)

    def decode(self, z, texts):
        scenes = []
        for row, text in zip(z, texts, strict=True):
            one = self.objects[text]
            concept = self.objects[self.broken[0]].concept if text in self.broken else one.concept
            item = Item(concept, one.color, 36, 36, 55, 0)
            free = [name for name in BACKGROUNDS if name not in (one.color, one.concept.color)]
            background = free[int(row.argmax())]
            scenes.append(Scene("", 0, "single", (item,), None, background, False))
        return rendered(scenes).images


@pytest.fixture(scope="module")
def singles():
    return rendered([scene for scene in drawn("train", 260) if len(scene.items) == 1])


@pytest.fixture(scope="module")
def measure(singles):
    """A function that measures known samplers."""
    templates = Templates.cut(singles.images, singles.metadata, "S")

    def measured(captions, priors, *, broken=(), singles=singles):
        sampling = KnownSampling(captions, broken)
        return measure_open(sampling, priors, captions, singles, templates, seeds=SEEDS)

    return measured


def test_captions_are_open_and_seen():
    captions = choose_captions("S", 30)
    assert len({caption.text for caption in captions}) == 30
    assert [caption.color is None for caption in captions] == [True] * 15 + [False] * 15
    assert not any(is_cell_held_out(one.concept, one.color) for one in captions)
    assert all(len(one.text.split()) <= 3 and "background" not in one.text for one in captions)
    assert {one.backgrounds for one in captions} <= {7, 8}
    every = choose_captions("S", 10_000)
    assert len(every) == len({caption.text for caption in every}) > 100


def test_captions_without_a_real_image_say_so(measure, singles):
    caption, *_ = choose_captions("S", 2)
    concepts = [scene["objects"][0]["concept"] for scene in singles.metadata]
    others = [row for row, code in enumerate(concepts) if code != caption.concept.hexcode]
    with pytest.raises(FileNotFoundError, match="prepare a larger data set"):
        measure([caption], [], singles=singles.take(others))


def test_the_spread_is_the_samplers(measure):
    captions = choose_captions("S", 6)
    found = measure(captions, ["diffusion", "linear"])
    assert found.keys() == {"data", "diffusion", "linear"}
    sampled, constant, data = (found[name] for name in ("diffusion", "linear", "data"))
    assert (sampled["embedding_spread"], sampled["backgrounds"]) == (1, SEEDS)
    assert (constant["embedding_spread"], constant["backgrounds"]) == pytest.approx((0, 1))
    assert data["embedding_spread"] == pytest.approx(0)
    draws = [{a, b, c} for a in range(7) for b in range(7) for c in range(7)]
    expected = {7: sum(map(len, draws)) / len(draws), 8: 8 * (1 - (7 / 8) ** 3)}
    mean = sum(expected[one.backgrounds] for one in captions) / len(captions)
    assert data["backgrounds"] == pytest.approx(mean)
    assert all(one["right"]["share"] == 1 for one in found.values())


def test_another_object_is_not_right(measure):
    captions = choose_captions("S", 6)
    broken = [one.text for one in captions if one.concept != captions[0].concept][:2]
    found = measure(captions, ["linear"], broken=(captions[0].text, *broken))
    assert found["linear"]["right"] == found["linear"]["right"] | {"share": 4 / 6, "n": 18}
