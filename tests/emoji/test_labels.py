import torch

from unclip.batch import UNKNOWN_LABEL
from unclip.emoji import COLORS, LayoutLabels, concepts
from unclip.emoji.catalog import SETS

APPLE, DOG = concepts("S")[:2]
SCENE = {
    "objects": [
        {"concept": APPLE.hexcode, "colour": "blue", "box": [0.0, 0.25, 0.5, 0.5]},
        {"concept": DOG.hexcode, "colour": None, "box": [0.6, 0.3, 0.2, 0.4]},
    ]
}


def test_cells_in_a_box_have_the_numbers_of_its_concept_and_color():
    things, colors = LayoutLabels(4)(SCENE)
    apple, dog, blue = APPLE.number, DOG.number, 2 + list(COLORS).index("blue")
    assert things.tolist() == [[0] * 4, *[[apple, apple, dog, 0]] * 2, [0] * 4]
    assert colors.tolist() == [[0] * 4, *[[blue, blue, 1, 0]] * 2, [0] * 4]


def test_the_preset_has_a_class_for_every_concept_and_color():
    assert max(concept.number for concept in concepts(SETS[-1])) + 1 == 421
    assert len(COLORS) + 2 == 10


def test_other_metadata_have_unknown_labels():
    boxes = {"objects": [{"concept": "none", "colour": None, "box": [0, 0, 1, 1]}]}
    for metadata in ({}, {"objects": "a dog"}, {"objects": [{"bbox": [1, 2]}]}, boxes):
        assert torch.equal(LayoutLabels(4)(metadata), torch.full((2, 4, 4), UNKNOWN_LABEL))
