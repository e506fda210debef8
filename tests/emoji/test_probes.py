"""Questions about scenes: counterfactual captions equal those of counterfactual scenes."""

from itertools import product

import pytest
from many_scenes import groups_of, scenes_of

from unclip.emoji import concepts
from unclip.emoji.captions import captions
from unclip.emoji.probes import (
    counterfactual_probes,
    exchange_colors,
    exchange_places,
    object_probes,
    replace_concept,
    replace_count,
)
from unclip.emoji.prompts import caption_pairs, sheet_prompts
from unclip.emoji.scene_files import description


def pairs(name, count=1200):
    return [group for group in groups_of(name, "train", count) if group[0].relation]


def objects_of(scene):
    return [
        {"concept": item.concept.hexcode, "name": item.concept.name, "colour": item.color}
        for item in scene.items
    ]


def forms(scene):
    """The five captions; the last, which is one of two, in the order of the first."""
    texts = captions(scene, seed=0)
    return texts[:4] + ([texts[4]] if "left of" in texts[4] or "above" in texts[4] else [])


@pytest.mark.parametrize("name", ["S", "L"])
def test_exchanged_places_are_the_captions_of_the_twin(name):
    compared = 0
    for scene, *twins in pairs(name):
        (twin,) = [twin for twin in twins if twin.key.endswith("-swap")]
        for mine, other in zip(forms(scene), forms(twin), strict=False):
            assert exchange_places(mine) == other
            assert exchange_places(exchange_places(mine)) == mine
            compared += 1
    assert compared > 500


@pytest.mark.parametrize("name", ["S", "L"])
def test_exchanged_colors_are_the_captions_of_the_repainted_scene(name):
    colored = [g[0] for g in pairs(name) if g[0].kind == "coloured_pair"]
    assert len(colored) > 30
    for scene in colored:
        first, second = scene.items
        items = (first._replace(color=second.color), second._replace(color=first.color))
        found = [exchange_colors(text, objects_of(scene)) for text in captions(scene, seed=0)]
        assert found == captions(scene._replace(items=items), seed=0)


@pytest.mark.parametrize("name", ["S", "M"])
def test_a_replaced_concept_is_the_caption_of_the_scene_with_it(name):
    plain = [concept._replace(alias="") for concept in concepts(name)]
    for scene, *_ in pairs(name, count=200):
        items = [item._replace(concept=item.concept._replace(alias="")) for item in scene.items]
        texts = captions(scene._replace(items=tuple(items)), seed=0)
        for row, concept in product((0, 1), plain[::7]):
            new = [*items]
            new[row] = items[row]._replace(concept=concept)
            objects = objects_of(scene)
            found = [replace_concept(text, objects, row, concept.name) for text in texts]
            assert found == captions(scene._replace(items=tuple(new)), seed=0)


def test_the_article_follows_the_new_words():
    objects = [{"name": "dog", "colour": "orange"}, {"name": "apple", "colour": None}]
    caption = "an apple to the right of an orange puppy on an orange background"
    assert replace_concept(caption, objects, 1, "unicorn").startswith("a unicorn to the right of")
    assert " of an orange unicorn on an orange " in replace_concept(caption, objects, 0, "unicorn")
    assert exchange_places(caption).startswith("an orange puppy to the right of an apple on an ")
    objects[1]["colour"] = "red"
    exchanged = exchange_colors("an orange puppy above a red apple", objects)
    assert exchanged == "a red puppy above an orange apple"


@pytest.mark.parametrize("name", ["S", "L"])
def test_another_count_is_the_caption_of_the_scene_with_it(name):
    counted = [scene for scene in scenes_of(name, "train", 400) if scene.kind == "count"]
    assert len(counted) > 10
    for scene in counted:
        item, count = scene.items[0], len(scene.items)
        others = [scene._replace(items=(item,) * n) for n in (2, 3, 4) if n != count]
        texts = [captions(other, seed=0) for other in others]
        for form, mine in enumerate(captions(scene, seed=0)):
            assert replace_count(mine) == [text[form] for text in texts]


def test_a_caption_of_another_form_is_an_error():
    with pytest.raises(ValueError, match="does not state a relation"):
        exchange_places("two dogs on a red background")
    with pytest.raises(ValueError, match="does not state a number"):
        replace_count("a dog above an apple")


def test_probes_have_the_true_caption_first_and_every_other_concept_once():
    shown = scenes_of("S", "train", 300)
    metadata = [{"relation": s.relation, "objects": objects_of(s)} for s in shown]
    texts = [captions(s, seed=0)[0] for s in shown]
    asked = counterfactual_probes(texts, metadata, "S")
    related = [row for row, scene in enumerate(shown) if scene.relation]
    colored = [row for row in related if shown[row].kind == "coloured_pair"]
    assert asked["pair_places"].rows == related and asked["pair_colors"].rows == colored
    assert asked["pair_concept"].rows == [row for row in colored for _ in range(2)]
    counted = [row for row, scene in enumerate(shown) if scene.kind == "count"]
    assert asked["count"].rows == counted != []
    for probe, among in zip(asked.values(), (2, 2, 18, 3), strict=True):
        assert set(probe.answers) == {0}
        for row, choices in zip(probe.rows, probe.choices, strict=True):
            assert choices[0] == texts[row] and len(set(choices)) == len(choices) == among


def test_probes_ask_only_what_an_image_can_answer():
    drawn = scenes_of("S", "train", 60, seed=1)
    asked = object_probes([description(scene, seed=0) for scene in drawn], "S")
    for name, probe in asked.items():
        for row, choices, answer in zip(probe.rows, probe.choices, probe.answers, strict=True):
            (item,) = drawn[row].items
            assert item.concept.name in choices[answer]
            assert name == "concept" or f" {item.color} " in f" {choices[answer]} "
            assert len(set(choices)) == len(choices) == (8 if name == "color" else 18)
    assert asked["concept"].choices[0][:2] == ["an apple", "a dog"]
    kinds = {name: {drawn[row].kind for row in probe.rows} for name, probe in asked.items()}
    assert kinds["concept"] == {"single"}
    assert kinds["concept_recolored"] == kinds["color"] == {"recoloured"}


def test_sheet_prompts_cover_the_set_and_the_held_out_cells():
    kinds = sheet_prompts("S", most=24)
    assert len(kinds["natural"]) == 18 == len({p.concept for p in kinds["natural"]})
    assert {p.color for p in kinds["natural"]} == {None}
    assert not any(p.held_out for p in kinds["seen"]) and all(p.held_out for p in kinds["held out"])
    cells = [(p.concept, p.color) for p in kinds["held out"]]
    assert 0 < len(set(cells)) == len(cells) <= 24
    few = sheet_prompts("M", most=5)
    assert [len(prompts) for prompts in few.values()] == [5, 4, 5]  # a monkey is never recolored


def test_a_caption_pair_differs_in_one_thing():
    shown = [description(scene, seed=0) for scene in scenes_of("S", "test_seen", 60)]
    singles = [row for row, one in enumerate(shown) if one["kind"] == "recoloured"]
    found = caption_pairs(shown, 12, seed=1)
    assert [pair.row for pair in found] == singles[:12]
    assert [pair.changed for pair in found[:4]] == ["color", "object", "background", "color"]
    for pair in found:
        assert shown[pair.row]["captions"][0] == pair.source
        different = set(pair.source.split()) ^ set(pair.target.split())
        assert len(different - {"a", "an"}) == 2
    assert caption_pairs(shown, 12, seed=1) == found != caption_pairs(shown, 12, seed=2)
    with pytest.raises(ValueError, match=f"are needed, not {len(singles)}"):
        caption_pairs(shown, len(singles) + 1, seed=0)
