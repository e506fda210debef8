"""Write scenes to webdataset shards with reproducible bytes: KEY.png and KEY.json."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from unclip.data.prepare.resumable import write_samples
from unclip.emoji.captions import captions
from unclip.emoji.render import place, scene_png
from unclip.emoji.scenes import CANVAS, Scene, scenes

SHARDS = {"train": 16, "val": 4, "test_seen": 4, "test_held_out": 4}


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
    write_samples(
        path,
        (
            {
                "__key__": scene.key,
                "png": scene_png(scene, size),
                "json": description(scene, seed=seed),
            }
            for scene in scenes_of(concept_set, seed, split, indices)
        ),
    )


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
