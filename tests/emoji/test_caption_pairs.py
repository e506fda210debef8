"""Caption pairs differ in one thing, as the text diffs need them."""

import pytest

from unclip.emoji.prompts import caption_pairs
from unclip.emoji.scene_files import description
from unclip.emoji.scenes import scenes

SCENES = [
    description(scene, seed=0)
    for index in range(60)
    for scene in scenes("S", seed=0, split="test_seen", index=index)
]
SINGLES = [
    row
    for row, one in enumerate(SCENES)
    if len(one["objects"]) == 1 and one["objects"][0]["colour"]
]


def test_a_pair_differs_in_one_thing():
    pairs = caption_pairs(SCENES, 12, seed=1)
    assert [pair.row for pair in pairs] == SINGLES[:12]
    assert [pair.changed for pair in pairs[:4]] == ["color", "object", "background", "color"]
    for pair in pairs:
        (item,) = SCENES[pair.row]["objects"]
        assert f"{item['colour']} {item['name']} on " in pair.source
        assert SCENES[pair.row]["captions"][0] == pair.source
        different = set(pair.source.split()) ^ set(pair.target.split())
        assert len(different - {"a", "an"}) == 2


def test_the_seed_decides():
    assert caption_pairs(SCENES, 12, seed=1) == caption_pairs(SCENES, 12, seed=1)
    assert caption_pairs(SCENES, 12, seed=1) != caption_pairs(SCENES, 12, seed=2)


def test_too_few_images_are_an_error():
    count = len(SINGLES)
    with pytest.raises(ValueError, match=f"{count + 1} images .* are needed, not {count}"):
        caption_pairs(SCENES, count + 1, seed=0)
