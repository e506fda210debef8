"""Concept sets, held-out compositions, scenes: coverage and disjointness."""

from collections import Counter
from itertools import combinations

import pytest
from many_scenes import groups_of, scenes_of

from unclip import emoji
from unclip.emoji.catalog import cells, concepts_without_count, is_pair_held_out
from unclip.emoji.scenes import KIND_WEIGHTS, SPLITS, is_held_out, scenes


def test_sets_are_nested_and_large_enough():
    small, middle, large = (emoji.concepts(name) for name in "SML")
    assert set(small) < set(middle) < set(large)
    assert 16 <= len(small) <= 20 and len(middle) == 64 and len(large) >= 357
    assert all(concept.families for concept in small)
    assert sum(bool(concept.families) for concept in middle) >= 40


def test_names_are_plain_and_unique():
    concepts = emoji.concepts("L")
    words = [word for concept in concepts for word in (concept.name, concept.alias) if word]
    assert len(words) == len(set(words))
    assert all(word == word.lower().strip() and word.isascii() for word in words)
    for concept in concepts:
        assert concept.color in ("", *emoji.COLORS)
        assert set(concept.families) <= set(emoji.COLORS)
        # No name contains a color: a recolored object would contradict its own name.
        assert not set(concept.name.split()) & (set(emoji.COLORS) | set(emoji.BACKGROUNDS))


def test_an_unknown_set_is_an_error():
    with pytest.raises(ValueError, match="choose one of S, M, L"):
        emoji.concepts("XL")


@pytest.mark.parametrize("name", ["S", "M", "L"])
def test_about_fifteen_percent_of_cells_and_pairs_are_held_out(name):
    concepts = emoji.concepts(name)
    recolored = sum(len(emoji.COLORS) - 1 for concept in concepts if concept.families)
    assert 0.12 <= len(cells(name, held_out=True)) / recolored <= 0.18
    pairs = list(combinations(concepts, 2))
    assert 0.12 <= sum(is_pair_held_out(*pair) for pair in pairs) / len(pairs) <= 0.18
    assert all(is_pair_held_out(*pair) == is_pair_held_out(*pair[::-1]) for pair in pairs[:500])
    assert len(concepts_without_count()) == 3 and set(concepts_without_count()) <= set(concepts)


@pytest.mark.parametrize("name", ["S", "M", "L"])
def test_every_factor_value_can_occur_in_training(name):
    seen, held_out = (cells(name, held_out=choice) for choice in (False, True))
    recolorable = {concept for concept in emoji.concepts(name) if concept.families}
    assert {concept for concept, _ in seen} == recolorable
    assert {color for _, color in seen} == set(emoji.COLORS)
    assert not set(seen) & set(held_out)
    assert len(seen) + len(held_out) == len(recolorable) * len(emoji.COLORS)
    for concept in emoji.concepts(name):
        others = [other for other in emoji.concepts(name) if other != concept]
        assert not all(is_pair_held_out(concept, other) for other in others)


@pytest.mark.parametrize("name", ["S", "M", "L"])
@pytest.mark.parametrize("split", SPLITS)
def test_held_out_compositions_are_only_in_their_split(name, split):
    for scene in scenes_of(name, split, 400):
        assert is_held_out(scene) == scene.held_out == (split == "test_held_out")


def test_training_scenes_cover_every_factor():
    train = scenes_of("S", "train", 3000)
    assert {item.concept for scene in train for item in scene.items} == set(emoji.concepts("S"))
    assert {item.color for scene in train for item in scene.items} == {None, *emoji.COLORS}
    assert {scene.background for scene in train} == set(emoji.BACKGROUNDS)
    assert {scene.kind for scene in train} == set(KIND_WEIGHTS["S"])
    assert {scene.relation for scene in train} == {None, "left of", "above"}
    assert {len(scene.items) for scene in train if scene.kind == "count"} == {2, 3, 4}
    recolored = [scene.items[0] for scene in train if scene.kind == "recoloured"]
    seen = {(item.concept, item.color) for item in recolored}
    assert seen == set(cells("S", held_out=False))


def test_held_out_split_has_every_kind_that_can_be_held_out():
    held_out = scenes_of("S", "test_held_out", 400)
    assert {scene.kind for scene in held_out} == set(KIND_WEIGHTS["S"]) - {"single"}
    fours = {scene.items[0].concept for scene in held_out if scene.kind == "count"}
    assert fours == set(concepts_without_count())


def test_kinds_have_their_shares_outside_training():
    kinds = Counter(scene.kind for scene in scenes_of("M", "val", 4000))
    shares = {kind: count / kinds.total() for kind, count in kinds.items()}
    expected = {"single": 0.4, "recoloured": 0.2, "pair": 0.2, "count": 0.1, "coloured_pair": 0.1}
    assert shares == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize("name", ["S", "M", "L"])
def test_about_half_of_the_training_images_show_two_recolored_objects(name):
    kinds = Counter(scene.kind for scene in scenes_of(name, "train", 2000))
    assert 0.45 < kinds["coloured_pair"] / kinds.total() < 0.6


def test_a_scene_is_a_function_of_set_seed_split_and_index():
    def one(**changes):
        return scenes(**{"name": "S", "seed": 0, "split": "train", "index": 7} | changes)

    assert one() == one()
    assert len({one(), one(seed=1), one(split="val"), one(index=8)}) == 4


def test_a_swapped_twin_exchanges_the_places_of_its_objects():
    pairs = [group for group in groups_of("S", "train", 300) if group[0].relation]
    assert len(pairs) > 20
    for scene, *twins in pairs:
        (twin,) = (twin for twin in twins if twin.key == f"{scene.key}-swap")
        assert twin.background == scene.background
        shown = [(item.concept, item.color) for item in scene.items]
        assert [(item.concept, item.color) for item in twin.items] == shown[::-1]
        assert [(i.x, i.y) for i in twin.items] == [(i.x, i.y) for i in scene.items]
        for first, second in (scene.items, twin.items):
            axis = "y" if scene.relation == "above" else "x"
            assert getattr(first, axis) + (first.extent + second.extent) / 2 < getattr(second, axis)


def test_a_recolored_object_has_a_twin_with_another_concept():
    groups = [group for group in groups_of("S", "train", 200) if group[0].kind == "recoloured"]
    assert len(groups) > 20
    for scene, twin in groups:
        (item,), (other,) = scene.items, twin.items
        assert other.concept != item.concept and other._replace(concept=item.concept) == item
        assert twin.key == f"{scene.key}-other" and not is_held_out(twin)
        assert twin.background == scene.background


def test_the_twins_of_a_pair_change_one_concept_or_exchange_the_colors():
    groups = [group for group in groups_of("S", "train", 400) if group[0].kind == "coloured_pair"]
    kinds = Counter(twin.key.partition("-")[2] for group in groups for twin in group[1:])
    assert kinds["swap"] == kinds["other"] == len(groups) > 80
    assert 0.5 * len(groups) < kinds["colours"] < len(groups)
    for scene, *twins in groups:
        assert [twin.key for twin in twins] == sorted(twin.key for twin in twins)
        twins = {twin.key.partition("-")[2]: twin for twin in twins}
        (first, second), (other, another) = scene.items, twins["other"].items
        assert (other.color, another.color) == (first.color, second.color)
        assert (other.concept != first.concept) + (another.concept != second.concept) == 1
        if "colours" in twins:
            exchanged = (first._replace(color=second.color), second._replace(color=first.color))
            assert twins["colours"].items == exchanged


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_other_splits_have_only_swapped_twins(split):
    twins = [twin for group in groups_of("S", split, 200) for twin in group[1:]]
    assert {twin.key.partition("-")[2] for twin in twins} == {"swap"}


def test_no_object_has_the_color_of_its_background():
    for scene in scenes_of("M", "train", 500):
        for item in scene.items:
            assert scene.background != (item.color or item.concept.color)


def test_prompts_run_through_the_concepts_and_all_cells():
    prompts = emoji.prompts("S", count=36)
    assert [prompt.concept for prompt in prompts] == [*emoji.concepts("S")] * 2
    everything = emoji.prompts("S")
    assert everything[:36] == prompts and len(everything) == len({p.caption for p in everything})
    unseen = {(prompt.concept, prompt.color) for prompt in everything if prompt.held_out}
    assert unseen == set(cells("S", held_out=True))
    white = [prompt for prompt in everything if prompt.color and prompt.background == "white"]
    assert len(white) == 18 * 8
    for prompt in white:
        assert f"{prompt.color} {prompt.concept.name} on a white" in prompt.caption
