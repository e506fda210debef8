"""Write scenes to shards (KEY.png and KEY.json) and in COCO's caption and instance formats.

COCO's formats are for tools that read only those. `val2014` joins the two test splits. Additional
fields are an image's key, split, held_out and kind, and an instance's attributes.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from unclip.data.prepare.resumable import write_samples
from unclip.emoji.captions import captions
from unclip.emoji.catalog import LICENSE, LICENSE_URL, concepts
from unclip.emoji.render import area, place, scene_png
from unclip.emoji.scenes import CANVAS, Item, Scene, scenes
from unclip.files import atomic_write, write_text

SHARDS = {"train": 16, "val": 4, "test_seen": 4, "test_held_out": 4}
IMAGE_SIZE = 256  # of the COCO export, in pixels
TEST_SPLITS = ("test_seen", "test_held_out")


def shard_indices(count: int, split: str) -> list[range]:
    """Return the scene indices of each shard of a split."""
    parts = SHARDS[split]
    return [range(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def scenes_of(concept_set: str, seed: int, split: str, indices: Iterable[int]) -> Iterator[Scene]:
    """Yield the scenes at `indices`, each followed by its twins."""
    for index in indices:
        yield from scenes(concept_set, seed=seed, split=split, index=index)


def write_shard(
    path: Path, concept_set: str, seed: int, split: str, size: int, indices: range
) -> None:
    """Render the scenes at `indices` into the tar file `path`."""
    shown = scenes_of(concept_set, seed, split, indices)
    samples = (
        {"__key__": one.key, "png": scene_png(one, size), "json": description(one, seed=seed)}
        for one in shown
    )
    write_samples(path, samples)


def description(scene: Scene, *, seed: int) -> dict:
    """Return the json member of a scene; boxes are x, y, width, height in [0, 1]."""
    return {
        "captions": captions(scene, seed=seed),
        "objects": [
            {
                "concept": item.concept.hexcode,
                "name": item.concept.name,
                "colour": item.color,
                "box": [round(value / CANVAS, 5) for value in place(item).box],
            }
            for item in scene.items
        ],
        "background": scene.background,
        "kind": scene.kind,
        "relation": scene.relation,
        "held_out": scene.held_out,
        "index": scene.index,
    }


def write_images(folder: Path, concept_set: str, seed: int, split: str, indices: range) -> None:
    """Render the scenes of a test split at `indices` that do not exist yet."""
    for scene in scenes_of(concept_set, seed, split, indices):
        path = folder / _file_name(scene)
        if not path.exists():
            with atomic_write(path) as temporary:
                temporary.write_bytes(scene_png(scene, IMAGE_SIZE))


def write_annotations(folder: Path, concept_set: str, seed: int, scenes: dict[str, int]) -> None:
    """Write captions_val2014.json and instances_val2014.json.

    `scenes` maps a split to its number of scenes, not counting twins.
    """
    images, texts, instances = [], [], []
    for split in TEST_SPLITS:
        for scene in scenes_of(concept_set, seed, split, range(scenes[split])):
            images.append(_image(scene, split))
            number = _image_id(scene)
            texts += [
                {"id": 10 * number + k, "image_id": number, "caption": caption}
                for k, caption in enumerate(captions(scene, seed=seed))
            ]
            instances += [
                {"id": 10 * number + k, "image_id": number, **_instance(item)}
                for k, item in enumerate(scene.items)
            ]
    categories = [
        {"id": concept.number, "name": concept.name, "supercategory": concept.group}
        for concept in concepts(concept_set)
    ]
    common = {
        "info": {"description": "Emoji scenes: the two test splits"},
        "licenses": [{"id": 1, "name": LICENSE, "url": LICENSE_URL}],
        "images": images,
    }
    for name, more in (
        ("captions", {"annotations": texts}),
        ("instances", {"annotations": instances, "categories": categories}),
    ):
        content = json.dumps(common | more, separators=(",", ":"))
        write_text(folder / f"{name}_val2014.json", content)


def _image_id(scene: Scene) -> int:
    return 1 + 4 * scene.index + 2 * scene.held_out + scene.key.endswith("-swap")


def _file_name(scene: Scene) -> str:
    return f"COCO_val2014_{_image_id(scene):012d}.png"


def _image(scene: Scene, split: str) -> dict:
    return {
        "id": _image_id(scene),
        "file_name": _file_name(scene),
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "license": 1,
        "key": scene.key,
        "split": split,
        "held_out": scene.held_out,
        "kind": scene.kind,
    }


def _instance(item: Item) -> dict:
    unit = IMAGE_SIZE / CANVAS
    return {
        "category_id": item.concept.number,
        "bbox": [round(value * unit, 2) for value in place(item).box],
        "area": round(area(item) * unit**2, 1),
        "iscrowd": 0,
        "attributes": {"colour": item.color, "natural_colour": item.concept.color or None},
    }
