"""Questions about single objects and prompts of a contact sheet."""

from unclip.emoji.probes import object_probes, sheet_prompts
from unclip.emoji.scene_files import description
from unclip.emoji.scenes import scenes


def test_probes_ask_only_what_an_image_can_answer():
    drawn = [s for k in range(60) for s in scenes("S", seed=1, split="train", index=k)]
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
