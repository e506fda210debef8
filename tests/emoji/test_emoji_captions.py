"""Captions: five per scene, grammatical and true."""

import re
from itertools import product

import pytest
from many_scenes import groups_of, scenes_of

from unclip import emoji
from unclip.emoji.captions import article, captions

NUMBERS = {"two": 2, "three": 3, "four": 4}


def test_the_article_fits_the_first_sound():
    for expected in ("an apple", "a red apple", "an orange car", "an umbrella", "an ice skate"):
        assert article(expected.partition(" ")[2]) == expected
    assert article("unicorn") == "a unicorn" and article("hourglass") == "an hourglass"


@pytest.mark.parametrize("name", ["S", "L"])
def test_captions_are_grammatical(name):
    for scene in scenes_of(name, "train", 600):
        texts = captions(scene, seed=0)
        assert len(texts) == 5
        for text in texts:
            assert text == text.lower() == " ".join(text.split())
            assert re.fullmatch(r"[a-z' -]+", text)
            for found, following in re.findall(r"\b(an?) ([a-z]+)", text):
                vowel = following[0] in "aeiou" and following != "unicorn"
                assert found == ("an" if vowel else "a"), text
            stated = [count for word, count in NUMBERS.items() if f"{word} " in text]
            assert stated == ([len(scene.items)] if scene.kind == "count" else [])


def test_the_full_caption_names_everything():
    for scene in scenes_of("M", "train", 600):
        full = captions(scene, seed=0)[0]
        assert full.endswith(f"{article(scene.background)} background")
        for item in scene.items:
            name = item.concept.plural if scene.kind == "count" else item.concept.name
            assert f"{item.color} {name}" in full if item.color else name in full
        if scene.relation:
            assert f" {scene.relation} " in full
        if scene.kind == "count":
            assert NUMBERS[full.split()[0]] == len(scene.items)


def test_only_the_obvious_color_of_a_drawing_is_named():
    for scene in scenes_of("M", "train", 600):
        for text in captions(scene, seed=0) if scene.kind == "single" else ():
            said = set(text.replace(f"{scene.background} background", "").split())
            assert said & set(emoji.COLORS) <= {scene.items[0].concept.color}


def test_no_caption_of_a_pair_fits_its_twin():
    pairs = [group for group in groups_of("M", "train", 600) if group[0].relation is not None]
    assert len(pairs) > 50
    for group in pairs:
        said = [text for scene in group for text in set(captions(scene, seed=0))]
        assert len(said) == len(set(said))


def test_every_caption_of_a_pair_states_the_relation():
    """Parsed: "P left of Q" and "Q to the right of P" mean the same."""
    pairs = [scene for scene in scenes_of("M", "train", 600) if scene.relation is not None]
    for scene, number in product(pairs, range(5)):
        text = captions(scene, seed=0)[number]
        names = [{item.concept.name, item.concept.alias} - {""} for item in scene.items]
        inverse = {"left of": "right of", "above": "below"}[scene.relation]
        assert (f" {scene.relation} " in text) != (f" {inverse} " in text)
        relation = scene.relation if f" {scene.relation} " in text else inverse
        before, after = text.split(f" {relation} ")
        first, second = names if relation == scene.relation else names[::-1]
        assert any(before.removesuffix(" to the").endswith(name) for name in first), text
        assert any(re.search(rf"\b{name}( on|$)", after) for name in second), text


def test_the_vocabulary_of_the_small_set_is_small():
    texts = [text for scene in scenes_of("S", "train", 3000) for text in captions(scene, seed=0)]
    assert len({word for text in texts for word in text.split()}) < 120
    assert max(len(text.split()) for text in texts) <= 20
