"""The detector: its decoding by synthetic heatmaps, its targets and loss, its file."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from unclip.emoji import COLORS, concepts
from unclip.emoji.scenes import CANVAS
from unclip.evaluation import detector as module
from unclip.evaluation.detector import (
    Detection,
    EmojiDetector,
    accuracy,
    detector_file,
    load_or_train,
    read_detector,
    recipe_of,
    write_detector,
)
from unclip.evaluation.detector_training import (
    NO_COLOUR,
    Training,
    Truth,
    colour_number,
    detection_loss,
    disturbed,
    draw,
    free_scene,
    intersection_over_union,
    targets,
)
from unclip.networks.detector import Detector, Heads, find_peaks

TINY = Training(scenes=4, steps=2, batch_size=2, width=4)


def heads(classes=3, colors=2, size=16):
    return Heads(
        torch.full((1, classes, size, size), -8.0),
        torch.zeros(1, 4, size, size),
        torch.zeros(1, colors, size, size),
    )


def test_peaks_become_boxes_with_class_and_colour():
    said = heads()
    said.centre[0, 2, 4, 10] = 2.0
    said.centre[0, 2, 4, 11] = 1.0  # the same object's flank
    said.centre[0, 0, 5, 10] = 1.5  # another class for the same object
    said.centre[0, 1, 12, 2] = 0.0
    said.sides[0, :, 4, 10] = torch.tensor([0.1, 0.2, 0.15, 0.05])
    said.sides[0, :, 12, 2] = torch.tensor([0.5, 0.1, 0.1, 0.1])
    said.color[0, 1, 4, 10] = 3.0
    peaks = find_peaks(said, most=5)
    kept = peaks.score[0] > 0.3
    assert kept.sum() == 2 and kept[:2].all()
    assert peaks.score[0, :2].tolist() == pytest.approx([0.880797, 0.5])
    assert peaks.label[0, :2].tolist() == [2, 1]
    assert peaks.color[0, :2].tolist() == [1, 0]
    x, y = 10.5 / 16, 4.5 / 16
    assert peaks.box[0, 0].tolist() == pytest.approx([x - 0.1, y - 0.2, x + 0.15, y + 0.05])
    assert peaks.box[0, 1, 0] == 0  # a box ends where the picture does


def test_two_objects_of_one_class_are_two():
    said = heads()
    for x in (3, 8, 13):
        said.centre[0, 1, 8, x] = 1.0
    assert (find_peaks(said).score > 0.3).sum() == 3


def test_neighbours_of_which_both_are_sure_are_one_object():
    said = heads()
    said.centre[0, 1, 8, 8:10] = torch.tensor([18.0, 20.0])  # both are 1 in float32
    peaks = find_peaks(said)
    assert (peaks.score > 0.3).sum() == 1
    said.color[0, 1, 8, 9] = 1.0
    assert find_peaks(said).color[0, 0] == 1


def truth(*objects, size=64):
    count = len(objects)
    return Truth(
        torch.zeros(1, 3, size, size, dtype=torch.uint8),
        torch.tensor([count]),
        torch.tensor([[label for label, _, _ in objects]]),
        torch.tensor([[box for _, box, _ in objects]]),
        torch.tensor([[color for _, _, color in objects]]),
    )


def test_a_network_that_says_the_targets_has_next_to_no_loss_and_is_decoded_to_the_truth():
    wanted = truth((2, (0.1, 0.2, 0.5, 0.6), 1), (0, (0.6, 0.55, 0.95, 0.95), NO_COLOUR))
    heat, owner = targets(wanted, 16, 16, classes=3)
    assert (heat == 1).sum() == 2 and (owner == 0).sum() == (owner == 1).sum() == 9
    said = heads()
    said.centre.copy_(torch.logit(heat.clamp(1e-4, 1 - 1e-4)))
    middle = (torch.arange(16) + 0.5) / 16
    for k in range(2):
        left, upper, right, lower = wanted.box[0, k]
        x, y = middle.expand(16, 16), middle[:, None].expand(16, 16)
        sides = torch.stack([x - left, y - upper, right - x, lower - y])
        said.sides[0] = torch.where(owner[0] == k, sides, said.sides[0])
    said.color[0, 1] = torch.where(owner[0] == 0, 20.0, 0.0)
    right = float(detection_loss(said, wanted))
    assert right < 0.7  # the flanks of the bumps cost a little whatever is said
    peaks = find_peaks(said)
    assert peaks.label[0, :2].sort().values.tolist() == [0, 2]
    for k in range(2):
        row = int((peaks.label[0, :2] == wanted.label[0, k]).nonzero())
        torch.testing.assert_close(peaks.box[0, row], wanted.box[0, k], atol=1e-5, rtol=0)
    for part, wrong in ((said.color, -20.0), (said.centre, 0.0), (said.sides, 0.01)):
        kept = part.clone()
        part.copy_(part * 0 + wrong if part is not said.color else part * -1)
        assert float(detection_loss(said, wanted)) > right + 0.5
        part.copy_(kept)


def test_overlap_is_by_hand():
    first = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    second = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 2.0, 3.0, 3.0]])
    torch.testing.assert_close(intersection_over_union(first, second), torch.tensor([1 / 3, 0.0]))


def test_free_scenes_lie_apart_inside_the_picture_in_any_colour():
    pytest.importorskip("resvg_py")
    known = concepts("S")
    drawn = [free_scene(known, random.Random(seed)) for seed in range(200)]
    assert {len(scene.items) for scene in drawn} == {1, 2, 3, 4}
    for scene in drawn:
        for k, item in enumerate(scene.items):
            assert item.extent / 2 <= min(item.x, item.y, CANVAS - item.x, CANVAS - item.y)
            assert scene.background != (item.color or item.concept.color)
            for other in scene.items[:k]:
                away = max(abs(item.x - other.x), abs(item.y - other.y))
                assert away >= (item.extent + other.extent) / 2
    assert {item.color for scene in drawn for item in scene.items} == {None, *COLORS}


def test_training_pictures_have_their_objects_where_it_is_said():
    pytest.importorskip("resvg_py")
    drawn = draw("S", 6, seed=3)
    background = drawn.images[:, :, 0, 0]
    for row in range(6):
        differs = (drawn.images[row] != background[row, :, None, None]).any(dim=0)
        y, x = differs.nonzero(as_tuple=True)
        boxes = drawn.box[row, : drawn.count[row]] * 64
        ink = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        around = torch.cat([boxes[:, :2].min(dim=0).values, boxes[:, 2:].max(dim=0).values])
        assert (ink - around).abs().max() <= 1.5
    assert colour_number("red") == 0 and colour_number("white") == colour_number("") == NO_COLOUR
    assert torch.equal(draw("S", 6, seed=3).images, drawn.images)
    noisy = disturbed(drawn.images)
    assert noisy.shape == drawn.images.shape and noisy.abs().max() <= 1


def test_it_learns_its_pictures_by_heart():
    """A few steps on one object must do, or something between targets and decoding is wrong."""
    torch.manual_seed(1)
    wanted = truth((1, (0.25, 0.25, 0.75, 0.75), 1))
    wanted.images[..., 16:48, 16:48] = torch.tensor([250, 60, 20], dtype=torch.uint8)[:, None, None]
    network = Detector(classes=3, colors=2, width=8)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    image = wanted.images.float() / 127.5 - 1
    for _ in range(60):
        loss = detection_loss(network(image), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    peaks = find_peaks(network(image))
    assert peaks.score[0, 0] > 0.5 > peaks.score[0, 1]
    assert peaks.label[0, 0] == 1 and peaks.color[0, 0] == 1
    assert (peaks.box[0, 0] - wanted.box[0, 0]).abs().max() < 0.05


def fresh(width=4):
    torch.manual_seed(0)
    network = Detector(classes=len(concepts("S")), colors=len(COLORS), width=width).eval()
    return EmojiDetector(network, recipe_of("S", TINY))


def test_a_file_gives_the_same_detector_and_says_its_recipe(tmp_path):
    first, file = fresh(), tmp_path / "detector.safetensors"
    write_detector(file, first)
    second = read_detector(file)
    assert second.recipe == first.recipe and second.fingerprint == first.fingerprint
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    assert second(images, threshold=0.0) == first(images, threshold=0.0)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_it_is_trained_once_and_for_another_recipe_beside_the_first(tmp_path, monkeypatch):
    trained = []

    def train(concept_set, training, *, progress):
        trained.append(training)
        return fresh().network

    monkeypatch.setattr(module, "train_detector", train)
    for training in (TINY, TINY, Training(width=4), TINY):
        load_or_train(tmp_path, "S", training, progress=False)
    assert trained == [TINY, Training(width=4)]
    kept = {detector_file(tmp_path, "S", training) for training in trained}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept and len(kept) == 2


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "detector.safetensors"
    with pytest.raises(FileNotFoundError, match="metrics=limits"):
        read_detector(file)
    file.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="remove it"):
        read_detector(file)
    for metadata in (
        {},
        {"unclip_detector": "1", "recipe": json.dumps({"set": "S", "width": 4})},
        {"unclip_detector": "1", "recipe": json.dumps({"set": "X", "width": 4})},
    ):
        save_file({"x": torch.zeros(1)}, file, metadata=metadata)
        with pytest.raises(ValueError, match="remove it"):
            read_detector(file)


def test_a_detector_of_other_concepts_is_refused(tmp_path):
    first, file = fresh(), tmp_path / "detector.safetensors"
    first.recipe["concepts"] = first.recipe["concepts"][::-1]
    write_detector(file, first)
    with pytest.raises(ValueError, match="other concepts"):
        read_detector(file)


def test_accuracy_counts_found_false_and_coloured():
    scene = {
        "objects": [
            {"name": "apple", "colour": "blue", "box": [0.1, 0.1, 0.2, 0.2]},
            {"name": "dog", "colour": None, "box": [0.6, 0.6, 0.2, 0.2]},
        ]
    }
    near, far = (0.1, 0.1, 0.3, 0.28), (0.25, 0.1, 0.45, 0.3)
    dog = Detection("dog", 0.9, (0.6, 0.6, 0.8, 0.8), "red")
    apple = Detection("apple", 0.8, near, "blue")
    assert accuracy([[dog, apple]], [scene]) == {
        "found": 1.0,
        "false": 0.0,
        "colour": 1.0,
        "objects": 2,
        "pictures": 1,
    }
    worse = accuracy([[apple._replace(box=far), dog, dog]], [scene])
    assert (worse["found"], worse["false"], worse["colour"]) == (0.5, 1.0, 0.0)
