"""The suite from scenes, its scores, and pictures of a prompt file."""

import pytest
import torch

from unclip.emoji import COLORS, concepts
from unclip.evaluation.binding import (
    Compositions,
    composition_of,
    draw_suite,
    right,
    shares,
    wilson,
)
from unclip.evaluation.detector import (
    Detection,
    EmojiDetector,
    detector_file,
    recipe_of,
    write_detector,
)
from unclip.evaluation.detector_training import Training
from unclip.evaluation.geneval import Composition, Wanted, parse, plain
from unclip.evaluation.marking import marked, marked_sheet
from unclip.evaluation.real import Real
from unclip.evaluation.scores import Evidence, Pictures
from unclip.networks.detector import Detector

TRAINING = Training(width=4)


def scene(kind, *objects, relation=None, index=0, held_out=False):
    return {
        "kind": kind,
        "objects": [
            {"name": name, "colour": color, "box": [0.1 + 0.5 * k, 0.4, 0.2, 0.2]}
            for k, (name, color) in enumerate(objects)
        ],
        "relation": relation,
        "index": index,
        "held_out": held_out,
        "background": "white",
    }


SCENES = [
    scene("single", ("apple", None), index=0),
    scene("recoloured", ("dog", "blue"), index=1),
    scene("pair", ("cat", None), ("car", None), relation="left of", index=2),
    scene("pair", ("car", None), ("cat", None), relation="left of", index=2),
    scene("count", *[("star", None)] * 3, index=3),
    scene("coloured_pair", ("bell", "red"), ("boot", "pink"), relation="left of", index=4),
]


def suite(each=5, scenes=SCENES, captions=None):
    captions = captions or [f"caption {k}" for k in range(len(scenes))]
    images = torch.arange(len(scenes), dtype=torch.uint8)[:, None, None, None]
    real = Real(images.expand(-1, 3, 64, 64), captions, scenes)
    return draw_suite({"test_seen": real}, each)


def found_of(scene):
    """What a perfect detector says of a scene."""
    return [
        Detection(
            item["name"],
            0.9,
            (item["box"][0], 0.4, item["box"][0] + 0.2, 0.6),
            item["colour"] or "yellow",
        )
        for item in scene["objects"]
    ]


def test_scenes_become_genevals_tasks_each_beside_its_picture():
    drawn = suite()
    asked = {one.tag: one for one in drawn.compositions}
    assert len(asked) == len(drawn.compositions) == 6
    assert asked["single_object"].include == (Wanted("apple", 1),)
    assert asked["colors"].include == (Wanted("dog", 1, "blue"),)
    assert asked["counting"].include == (Wanted("star", 3),)
    assert asked["counting"].exclude == (Wanted("star", 4),)
    assert asked["two_object"].include == (Wanted("cat", 1), Wanted("car", 1))
    assert asked["position"].include == (
        Wanted("cat", 1),
        Wanted("car", 1, None, ("left of", 0)),
    )
    assert asked["color_attr"].include == (Wanted("bell", 1, "red"), Wanted("boot", 1, "pink"))
    for one, image in zip(drawn.compositions, drawn.images, strict=True):
        assert one.prompt == f"caption {int(image[0, 0, 0])}"
        assert parse(plain(one)).include == one.include
        assert plain(one)["held_out"] is False and plain(one)["split"] == "test_seen"


def test_no_prompt_comes_twice_and_no_task_has_more_than_asked():
    many = [scene("single", ("apple", None), index=k) for k in range(4)]
    captions = ["a", "a", "b", "c"]
    drawn = suite(2, many, captions)
    assert [one.prompt for one in drawn.compositions] == ["a", "b"]
    assert drawn.images[:, 0, 0, 0].tolist() == [0, 2]


def test_the_scenes_own_objects_are_right_and_each_change_is_wrong():
    drawn = suite()
    rows = drawn.images[:, 0, 0, 0].tolist()
    perfect = [found_of(SCENES[row]) for row in rows]
    assert right(drawn.compositions, perfect).all()
    assert not right(drawn.compositions, [[] for _ in rows]).any()
    verdict = dict(
        zip(
            [one.tag for one in drawn.compositions],
            right(
                drawn.compositions,
                [
                    [one._replace(color="brown", box=(0.4, 0.4, 0.6, 0.6)) for one in objects]
                    for objects in perfect
                ],
            ).tolist(),
            strict=True,
        )
    )
    assert verdict == {
        "single_object": True,
        "two_object": True,
        "counting": True,
        "colors": False,
        "position": False,
        "color_attr": False,
    }


def composition(tag, held_out):
    return Composition(tag, "x", (Wanted("apple", 1),), (), {"held_out": held_out})


def test_shares_are_by_task_and_the_mean_is_over_tasks():
    asked = [composition("colors", k == 0) for k in range(4)] + [composition("counting", False)]
    scores = shares(
        asked,
        torch.tensor([True, False, False, False, True]),
        torch.tensor([True, True, True, False, True]),
    )
    assert list(scores) == [
        "counting",
        "colors",
        "mean",
        "colors_held_out",
        "mean_held_out",
    ]
    assert (scores["colors"].value, scores["colors"].n, scores["colors"].real) == (0.25, 4, 0.75)
    assert scores["mean"].value == pytest.approx((0.25 + 1) / 2)
    assert scores["mean"].real == pytest.approx((0.75 + 1) / 2)
    assert scores["colors_held_out"].value == 1.0 and scores["colors_held_out"].n == 1
    assert all(score.rows is None for score in scores.values())
    assert shares(asked, torch.ones(5).bool())["mean"].real is None


def test_the_interval_is_wilsons():
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson(0.25, 4) == pytest.approx((0.0456, 0.6994), abs=1e-3)
    assert wilson(1.0, 48) == pytest.approx((1 - 0.0741, 1.0), abs=1e-3)
    share, count = 0.375, 4800  # of many, that of the normal distribution
    half = 1.96 * (share * (1 - share) / count) ** 0.5
    assert wilson(share, count) == pytest.approx((share - half, share + half), abs=1e-3)


@pytest.fixture
def bundle(tmp_path):
    torch.manual_seed(0)
    network = Detector(classes=len(concepts("S")), colors=len(COLORS), width=4).eval()
    path = detector_file(tmp_path, "S", TRAINING)
    write_detector(path, EmojiDetector(network, recipe_of("S", TRAINING)))
    return tmp_path


def test_pictures_of_a_prompt_file_are_judged_where_the_classes_are_known(bundle):
    lines = [
        {"tag": "single_object", "prompt": "x", "include": [{"class": "apple", "count": 1}]},
        {"tag": "single_object", "prompt": "x", "include": [{"class": "toaster", "count": 1}]},
    ]
    loaded = []

    def load(rows):
        loaded.extend(rows)
        return torch.zeros(len(rows), 3, 32, 32, dtype=torch.uint8)

    evidence = Evidence({}, {}, prompts=["x", "x"], about=lines, pictures=Pictures(2, load))
    metric = Compositions(bundle=bundle, training=TRAINING)
    scores = metric(evidence)
    assert loaded == [0] and scores.keys() == {"binding_single_object", "binding_mean"}
    assert scores["binding_mean"].about["not_judged"] == 1
    with pytest.raises(ValueError, match="protocol=geneval"):
        metric(Evidence({}, {}, about=[{}]))
    with pytest.raises(ValueError, match="none of the prompts"):
        metric(Evidence({}, {}, about=lines[1:]))
    with pytest.raises(FileNotFoundError, match="metrics=limits"):
        Compositions(bundle=bundle)(evidence)


def test_boxes_are_drawn_in_their_place():
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    drawn = marked(image, [Detection("apple", 0.5, (0.25, 0.5, 0.75, 1.0), "blue")])
    assert drawn.shape == (3, 144, 144)
    changed = (drawn != 200).any(dim=0)
    assert changed[71:74, 40:100].any(dim=0).all()  # the upper side
    assert not changed[100:130, 45:100].any() and not changed[:50].any()
    drawn = suite()
    objects = [found_of(SCENES[0])] * 6
    sheet = marked_sheet(drawn.images, objects, drawn.compositions, torch.ones(6).bool(), most=4)
    assert sheet.width > 600


def test_a_twin_is_the_second_of_a_pair():
    pair = SCENES[2]
    assert composition_of("c", pair, "test_seen", twin=False).tag == "two_object"
    assert composition_of("c", pair, "test_seen", twin=True).tag == "position"
