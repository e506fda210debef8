"""GenEval's file and rules, by hand-made lines and detections."""

import json
from typing import NamedTuple

import pytest

from unclip.evaluation.geneval import (
    Wanted,
    fault,
    parse,
    plain,
    relations,
    write_compositions,
)

# As GenEval's evaluation_metadata.jsonl has them, a task each.
LINES = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "cow", "count": 1}], "prompt": "a photo of a bench and a cow"}
{"tag": "counting", "include": [{"class": "clock", "count": 3}], "exclude": [{"class": "clock", "count": 4}], "prompt": "a photo of three clocks"}
{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "pink"}], "prompt": "a photo of a pink car"}
{"tag": "position", "include": [{"class": "tv", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a dog right of a tv"}
{"tag": "color_attr", "include": [{"class": "cow", "count": 1, "color": "red"}, {"class": "car", "count": 1, "color": "blue"}], "prompt": "a photo of a red cow and a blue car"}
"""  # noqa: E501


class Object(NamedTuple):
    name: str
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.1, 0.1)
    color: str = "green"


@pytest.fixture
def tasks():
    return {one.tag: one for one in (parse(json.loads(line)) for line in LINES.splitlines())}


def test_genevals_lines_are_read(tasks):
    assert list(tasks) == [
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
    ]
    assert tasks["counting"].include == (Wanted("clock", 3),)
    assert tasks["counting"].exclude == (Wanted("clock", 4),)
    assert tasks["position"].include[1] == Wanted("dog", 1, None, ("right of", 0))
    assert tasks["color_attr"].names == {"cow", "car"}


def test_what_is_written_is_genevals_line_and_what_is_known_beside_it(tmp_path, tasks):
    lines = [json.loads(line) for line in LINES.splitlines()]
    assert [plain(one) for one in tasks.values()] == lines
    marked = [parse({**lines[0], "held_out": True})]
    file = write_compositions(tmp_path / "new" / "file.jsonl", marked)
    assert json.loads(file.read_text()) == {**lines[0], "held_out": True}
    assert [parse(json.loads(file.read_text()))] == marked


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a dog"}',
        "[1]",
        '{"tag": "counting", "prompt": "x", "include": [{"class": "a"}]}',
        '{"tag": "position", "prompt": "x", "include": [{"class": "a", "count": 1, "position": ["left of", 0]}]}',  # noqa: E501
        '{"tag": "position", "prompt": "x", "include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["near", 0]}]}',  # noqa: E501
    ],
)
def test_a_line_of_something_else_is_named(line):
    with pytest.raises(ValueError, match=r"is not GenEval's|no position"):
        parse(json.loads(line))


def test_objects_must_be_there_and_no_more_than_asked(tasks):
    assert fault(tasks["single_object"], []) == "0 of 1 bench"
    assert fault(tasks["single_object"], [Object("cow"), Object("bench")]) is None
    assert fault(tasks["single_object"], [Object("bench")] * 3) is None  # as GenEval has it
    assert fault(tasks["two_object"], [Object("cow")]) == "0 of 1 bench"
    assert fault(tasks["two_object"], [Object("cow"), Object("bench")]) is None
    assert "2 of 3 clock" in fault(tasks["counting"], [Object("clock")] * 2)
    assert fault(tasks["counting"], [Object("clock")] * 3) is None
    assert "too many" in fault(tasks["counting"], [Object("clock")] * 4)


def test_color_is_asked_of_the_surest_objects(tasks):
    pink, green = Object("car", color="pink"), Object("car")
    assert fault(tasks["colors"], [pink, green]) is None
    assert fault(tasks["colors"], [green, pink]) == "car is green, not pink"
    swapped = [Object("cow", color="blue"), Object("car", color="red")]
    assert "cow is blue" in fault(tasks["color_attr"], swapped)
    assert fault(tasks["color_attr"], [Object("cow", color="red"), swapped[1]]) is not None
    right = [Object("cow", color="red"), Object("car", color="blue")]
    assert fault(tasks["color_attr"], right) is None


def test_position_is_that_of_the_object_to_its_target(tasks):
    tv, dog = Object("tv", (0.1, 0.4, 0.3, 0.6)), Object("dog", (0.6, 0.4, 0.8, 0.6))
    assert fault(tasks["position"], [tv, dog]) is None
    mirrored = [tv._replace(box=dog.box), dog._replace(box=tv.box)]
    assert fault(tasks["position"], mirrored) == "dog is left of tv, not right of"
    assert fault(tasks["position"], [dog]) == "0 of 1 tv"


def square(x, y, side):
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


def test_relations_have_genevals_tolerance():
    middle = square(0.5, 0.5, 0.2)
    # A tenth of both sides, 0.04 in all, is taken off: less than that is no relation.
    assert relations(square(0.539, 0.5, 0.2), middle) == set()
    # Of an offset of 0.07, 0.03 are left: 0.43 of it. Of 0.09, 0.05 are left: 0.56.
    assert relations(square(0.57, 0.5, 0.2), middle) == set()
    assert relations(square(0.59, 0.5, 0.2), middle) == {"right of"}
    assert relations(square(0.41, 0.5, 0.2), middle) == {"left of"}
    assert relations(square(0.5, 0.2, 0.2), middle) == {"above"}
    assert relations(square(0.5, 0.8, 0.2), middle) == {"below"}
    assert relations(middle, middle) == set()
    # On the diagonal both hold: (0.3 − 0.04) / (0.3 · √2) is 0.61 on each axis.
    assert relations(square(0.8, 0.8, 0.2), middle) == {"right of", "below"}
    # Larger boxes lose more: (0.3 − 0.1 · (0.8 + 0.2)) / (0.3 · √2) is 0.47.
    assert relations(square(0.8, 0.8, 0.8), middle) == set()
