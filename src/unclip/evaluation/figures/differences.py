"""Pairs of captions that differ in one thing, for pictures of one object: the text diffs' tasks."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unclip.emoji import BACKGROUNDS, COLORS
from unclip.emoji.captions import article


class Difference(NamedTuple):
    """One task.

    Attributes:
        row: which picture.
        source: what it shows.
        target: what it shall show.
        changed: the part of the caption that differs: object, color or background.
    """

    row: int
    source: str
    target: str
    changed: str


def differences(scenes: Sequence[Mapping[str, Any]], count: int, *, seed: int) -> list[Difference]:
    """The first `count` pictures of one coloured object, each with one thing to change.

    Colour, object and background take turns; what they become is drawn by `seed`, an object from
    the others in the pictures. No background gets its object's color.

    Raises:
        ValueError: there are not so many such pictures.
    """
    single = {
        row: scene
        for row, scene in enumerate(scenes)
        if len(scene.get("objects", ())) == 1 and scene["objects"][0].get("colour")
    }
    if len(single) < count:
        raise ValueError(f"{count} pictures of one coloured object are needed, not {len(single)}")
    names = sorted({scene["objects"][0]["name"] for scene in single.values()})
    choices = {"colour": list(COLORS), "object": names, "background": list(BACKGROUNDS)}
    tasks, draw = [], random.Random(seed)
    for turn, (row, scene) in enumerate(list(single.items())[:count]):
        (item,) = scene["objects"]
        is_now = {
            "colour": item["colour"],
            "object": item["name"],
            "background": scene["background"],
        }
        changed = list(choices)[turn % len(choices)]
        taken = {is_now[changed]}
        if changed != "object":
            taken |= {is_now["colour"], is_now["background"]}
        becomes = draw.choice([word for word in choices[changed] if word not in taken])
        tasks.append(
            Difference(row, _caption(**is_now), _caption(**{**is_now, changed: becomes}), changed)
        )
    return tasks


def _caption(*, color: str, object: str, background: str) -> str:
    return f"{article(f'{color} {object}')} on {article(background)} background"
