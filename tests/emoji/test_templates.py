"""The probes find in renders the objects that the scenes state, and no others."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("resvg_py")

from emoji_renders import drawn, rendered

from unclip.emoji import BACKGROUNDS
from unclip.emoji.templates import Templates, background_names, everywhere, main_colors, pairs
from unclip.evaluation.emoji_scenes import measure_scenes


@pytest.fixture(scope="module")
def singles():
    return rendered([s for s in drawn("train", 260) if len(s.items) == 1])


@pytest.fixture(scope="module")
def templates(singles):
    return Templates.cut(singles.images, singles.metadata, "S")


@pytest.fixture(scope="module")
def real():
    shown = [s for s in drawn("test_held_out", 90) if s.kind in ("coloured_pair", "recoloured")]
    return rendered(shown[:40])


def values(found):
    return {name: one["share"] for name, one in found.items()}


def changed(real, change):
    """The pairs, their metadata after `change(objects)`."""
    shown = copy.deepcopy(real.take(pairs(real.metadata)))
    for scene in shown.metadata:
        change(scene["objects"])
    return shown


def test_every_render_is_right(real, templates):
    assert 8 <= len(pairs(real.metadata)) < len(real)
    assert {scene["relation"] for scene in real.metadata} == {"left of", "above", None}
    found = measure_scenes(real, templates)
    assert values(found) == {"colors": 1, "concepts": 1, "both": 1, "single": 1}
    assert found["both"]["n"] == len(pairs(real.metadata)) == len(real) - found["single"]["n"]


def test_noise_does_not_hide_the_objects(real, templates):
    noise = torch.randn(real.images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (real.images + 8 * noise).clamp(0, 255).to(torch.uint8)
    assert set(values(measure_scenes(replace(real, images=noisy), templates)).values()) == {1}


def repaint(objects):
    taken = {item["colour"] for item in objects}
    objects[1]["colour"] = next(c for c in ("red", "green", "blue") if c not in taken)


def exchange(objects):
    codes = ("1F34E", "1F436", "1F431")
    objects[0]["concept"] = next(c for c in codes if c != objects[0]["concept"])


@pytest.mark.parametrize(
    ("change", "colors", "concepts"), [(list.reverse, 0, 0), (repaint, 0, 1), (exchange, 1, 0)]
)
def test_wrong_places_colors_and_concepts_are_seen(change, colors, concepts, real, templates):
    found = measure_scenes(changed(real, change), templates)
    assert values(found) == {"colors": colors, "concepts": concepts, "both": 0}


def test_an_empty_image_shows_no_color(templates):
    empty = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    assert main_colors(empty, everywhere(empty)).tolist() == [-1, -1]
    assert len(templates.name(empty, everywhere(empty))) == 2


def test_backgrounds_are_named(real):
    assert background_names(real.images) == [scene["background"] for scene in real.metadata]
    assert {scene["background"] for scene in real.metadata} <= set(BACKGROUNDS)


def test_a_concept_without_an_image_is_an_error(singles):
    dogless = [r for r, s in enumerate(singles.metadata) if s["objects"][0]["name"] != "dog"]
    with pytest.raises(FileNotFoundError, match="of one dog: prepare"):
        Templates.cut(singles.images[dogless], [singles.metadata[row] for row in dogless], "S")
