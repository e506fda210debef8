"""Prompts of one object for contact sheets, and pairs of captions for text diffs."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unclip.emoji.captions import full_caption
from unclip.emoji.catalog import BACKGROUNDS, COLORS, Concept, concepts, is_cell_held_out


class Prompt(NamedTuple):
    """A single-object prompt with its concept, color and background."""

    caption: str
    concept: Concept
    color: str | None  # None: the colors of the drawing
    background: str
    held_out: bool


def prompts(name: str, *, count: int | None = None) -> list[Prompt]:
    """Return `count` single-object prompts (None: all) of a set: concept × color × background.

    The prompts are in rounds. Each round has one prompt of every concept, in table order, with a
    random color and background. No background has the color of its object.
    """
    queues = []
    for concept in concepts(name):
        colors = [None, *(COLORS if concept.families else ())]
        queue = [
            Prompt(
                caption=full_caption(concept.name, color, background),
                concept=concept,
                color=color,
                background=background,
                held_out=is_cell_held_out(concept, color),
            )
            for color in colors
            for background in BACKGROUNDS
            if background not in (color, None if color else concept.color)
        ]
        random.Random(f"0/prompts/{concept.hexcode}").shuffle(queue)
        queues.append(queue)
    rounds = itertools.chain(*itertools.zip_longest(*queues))
    return [prompt for prompt in rounds if prompt is not None][:count]


def sheet_prompts(name: str, *, most: int) -> dict[str, list[Prompt]]:
    """Return single-object prompts for a contact sheet, at most `most` of each kind.

    `natural`: objects in their own colors, one of each concept, evenly spaced if there are more.
    `seen`: objects in other colors that training contains. `held out`: in colors that it does not.
    """
    known = concepts(name)
    count = min(most, len(known))
    shown = {known[place * len(known) // count] for place in range(count)}
    first: dict[str, dict[Any, Prompt]] = {"natural": {}, "seen": {}, "held out": {}}
    for prompt in prompts(name):
        kind = "held out" if prompt.held_out else "seen" if prompt.color else "natural"
        if prompt.held_out or prompt.concept in shown:
            cell = (prompt.concept, prompt.color if prompt.held_out else None)
            first[kind].setdefault(cell, prompt)
    return {kind: list(chosen.values())[:most] for kind, chosen in first.items()}


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

    Color, object and background are changed in turn, to values that `seed` chooses. A new object is
    one of the other images'; no background gets its object's color. `scenes` are the metadata.

    Raises:
        ValueError: there are fewer than `count` such images.
    """
    single = [
        {**scene["objects"][0], "row": row, "background": scene["background"]}
        for row, scene in enumerate(scenes)
        if len(scene.get("objects", ())) == 1 and scene["objects"][0].get("colour")
    ]
    if len(single) < count:
        raise ValueError(f"{count} images of one recolored object are needed, not {len(single)}")
    names = sorted({item["name"] for item in single})
    choices = {"color": list(COLORS), "object": names, "background": list(BACKGROUNDS)}
    pairs, rng = [], random.Random(seed)
    for turn, item in enumerate(single[:count]):
        old = {"object": item["name"], "color": item["colour"], "background": item["background"]}
        changed = list(choices)[turn % len(choices)]
        taken = {item["name"]} if changed == "object" else {item["colour"], item["background"]}
        new = rng.choice([word for word in choices[changed] if word not in taken])
        source, target = (full_caption(*about.values()) for about in (old, old | {changed: new}))
        pairs.append(CaptionPair(item["row"], source, target, changed))
    return pairs
