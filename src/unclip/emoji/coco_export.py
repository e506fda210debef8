"""Export the splits in COCO's caption and instance formats, for tools that read only those.

`val2014` joins the two test splits, with images. `train2014` has captions only, because its images
are in the shards. Additional fields are an image's key, split, held_out and kind, and an instance's
attributes.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from unclip.emoji.captions import captions
from unclip.emoji.catalog import LICENSE, LICENSE_URL, concepts
from unclip.emoji.render import area, place, scene_png
from unclip.emoji.scene_shards import scenes_of
from unclip.emoji.scenes import CANVAS, Scene
from unclip.files import atomic_write, write_text

IMAGE_SIZE = 256
TEST_SPLITS = ("test_seen", "test_held_out")


def write_images(folder: Path, concept_set: str, seed: int, split: str, indices: range) -> None:
    """Render the scenes of a test split at `indices` that do not exist yet."""
    for scene in scenes_of(concept_set, seed, split, indices):
        path = folder / _file_name("val2014", _image_id(scene))
        if not path.exists():
            with atomic_write(path) as temporary:
                temporary.write_bytes(scene_png(scene, IMAGE_SIZE))


def write_annotations(folder: Path, concept_set: str, seed: int, scenes: dict[str, int]) -> None:
    """Write captions_{train,val}2014.json and instances_val2014.json.

    `scenes` maps a split to its number of scenes, not counting twins.
    """

    def listed(*splits: str) -> list[tuple[str, Scene]]:
        return [
            (split, scene)
            for split in splits
            for scene in scenes_of(concept_set, seed, split, range(scenes[split]))
        ]

    test, train = listed(*TEST_SPLITS), listed("train")
    images = _images("val2014", test)
    categories = [
        {"id": concept.number, "name": concept.name, "supercategory": concept.group}
        for concept in concepts(concept_set)
    ]
    _write(folder / "captions_val2014.json", images, _captions(test, seed))
    _write(folder / "captions_train2014.json", _images("train2014", train), _captions(train, seed))
    _write(folder / "instances_val2014.json", images, _instances(test), categories=categories)


def _image_id(scene: Scene) -> int:
    return 1 + 4 * scene.index + 2 * scene.held_out + scene.key.endswith("-swap")


def _file_name(part: str, image_id: int) -> str:
    return f"COCO_{part}_{image_id:012d}.png"


def _images(part: str, scenes: Iterable[tuple[str, Scene]]) -> list[dict]:
    return [
        {
            "id": _image_id(scene),
            "file_name": _file_name(part, _image_id(scene)),
            "width": IMAGE_SIZE,
            "height": IMAGE_SIZE,
            "license": 1,
            "key": scene.key,
            "split": split,
            "held_out": scene.held_out,
            "kind": scene.kind,
        }
        for split, scene in scenes
    ]


def _captions(scenes: Iterable[tuple[str, Scene]], seed: int) -> list[dict]:
    return [
        {"id": 10 * _image_id(scene) + number, "image_id": _image_id(scene), "caption": caption}
        for _, scene in scenes
        for number, caption in enumerate(captions(scene, seed=seed))
    ]


def _instances(scenes: Iterable[tuple[str, Scene]]) -> list[dict]:
    unit = IMAGE_SIZE / CANVAS
    return [
        {
            "id": 10 * _image_id(scene) + number,
            "image_id": _image_id(scene),
            "category_id": item.concept.number,
            "bbox": [round(value * unit, 2) for value in place(item).box],
            "area": round(area(item) * unit**2, 1),
            "iscrowd": 0,
            "attributes": {"colour": item.color, "natural_colour": item.concept.color or None},
        }
        for _, scene in scenes
        for number, item in enumerate(scene.items)
    ]


def _write(path: Path, images: list[dict], annotations: list[dict], **more) -> None:
    content = {
        "info": {
            "description": "Emoji scenes: val2014 has images, those of train2014 are in shards"
        },
        "licenses": [{"id": 1, "name": LICENSE, "url": LICENSE_URL}],
        "images": images,
        "annotations": annotations,
        **more,
    }
    write_text(path, json.dumps(content, separators=(",", ":")))
