"""Pairs of captions that differ in one thing, for images of one object: tasks of text diffs."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unclip.emoji.captions import article
from unclip.emoji.catalog import BACKGROUNDS, COLORS


class CaptionPair(NamedTuple):
    """One text diff."""

    row: int  # index of the image
    source: str  # caption of the image
    target: str  # caption that the edited image should match
    changed: str  # part of the caption that differs: "object", "color" or "background"


def caption_pairs(
    scenes: Sequence[Mapping[str, Any]], count: int, *, seed: int
) -> list[CaptionPair]:
    """Return one change for each of the first `count` images of one recolored object.

    Color, object and background are changed in turn. A new object is one of the other images'; no
    background gets its object's color.

    Args:
        scenes: metadata of each image.
        count: number of pairs.
        seed: seed that chooses the new values.

    Raises:
        ValueError: there are fewer than `count` such images.
    """
    single = {
        row: scene
        for row, scene in enumerate(scenes)
        if len(scene.get("objects", ())) == 1 and scene["objects"][0].get("colour")
    }
    if len(single) < count:
        raise ValueError(f"{count} images of one recolored object are needed, not {len(single)}")
    names = sorted({scene["objects"][0]["name"] for scene in single.values()})
    choices = {"color": list(COLORS), "object": names, "background": list(BACKGROUNDS)}
    tasks, rng = [], random.Random(seed)
    for turn, (row, scene) in enumerate(list(single.items())[:count]):
        (item,) = scene["objects"]
        old = {
            "color": item["colour"],
            "object": item["name"],
            "background": scene["background"],
        }
        changed = list(choices)[turn % len(choices)]
        taken = {old[changed]}
        if changed != "object":
            taken |= {old["color"], old["background"]}
        new = rng.choice([word for word in choices[changed] if word not in taken])
        target = _caption({**old, changed: new})
        tasks.append(CaptionPair(row, _caption(old), target, changed))
    return tasks


def _caption(parts: Mapping[str, str]) -> str:
    item = article(f"{parts['color']} {parts['object']}")
    return f"{item} on {article(parts['background'])} background"
