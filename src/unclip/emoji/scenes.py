"""Scenes as plain data: the objects with their places and sizes, without pixels or captions.

A scene is a function of (set, seed, split, index) alone, so any process can make any scene.
Lengths are in units of OpenMoji's 72 × 72 canvas.
"""

import random
from functools import partial
from typing import NamedTuple

from unclip.emoji.catalog import (
    BACKGROUNDS,
    COLORS,
    Concept,
    cells,
    concepts,
    is_cell_held_out,
    is_count_held_out,
    is_pair_held_out,
)

CANVAS = 72.0
SPLITS = ("train", "val", "test_seen", "test_held_out")
SINGLE_EXTENT, PAIR_EXTENT, COUNT_EXTENT = 58.0, 31.0, 28.0  # the longer side at scale 1

# Relative frequency of each kind of scene, before twins are added. The names are in the shards.
KIND_WEIGHTS = {
    "S": {"single": 38, "recoloured": 42, "pair": 7, "count": 6, "coloured_pair": 7},
    "M": {"single": 40, "recoloured": 20, "pair": 10, "count": 10, "coloured_pair": 5},
    "L": {"single": 40, "recoloured": 20, "pair": 10, "count": 10, "coloured_pair": 5},
}
# In training, with the twins, more than half of the images show two recolored objects: neither
# CLIP nor the decoder learns to bind colors and concepts to places from fewer.
TRAIN_KIND_WEIGHTS = {"single": 26, "recoloured": 28, "pair": 8, "count": 6, "coloured_pair": 32}


class Jitter(NamedTuple):
    """Random variation of the placement, smaller in set S."""

    smallest: float  # smallest scale; the largest is 1
    shift: float  # largest shift of a single object's center
    rotation: float  # largest rotation in degrees


JITTER = {"S": Jitter(0.88, 3.0, 4.0), "M": Jitter(0.75, 6.0, 8.0), "L": Jitter(0.75, 6.0, 8.0)}
PAIR_CENTERS = {"left of": ((18.5, 36.0), (53.5, 36.0)), "above": ((36.0, 18.5), (36.0, 53.5))}
COUNT_CENTERS = {
    2: ((19.0, 36.0), (53.0, 36.0)),
    3: ((19.0, 20.0), (53.0, 20.0), (36.0, 52.0)),
    4: ((19.0, 19.0), (53.0, 19.0), (19.0, 53.0), (53.0, 53.0)),
}


class Item(NamedTuple):
    """A placed object."""

    concept: Concept
    color: str | None  # None: the colors of the drawing
    x: float  # center of its box
    y: float
    extent: float  # longer side of its box
    angle: float  # degrees, clockwise


class Scene(NamedTuple):
    """The content of one image."""

    key: str
    index: int
    kind: str
    items: tuple[Item, ...]  # a pair's first item is the left or the upper one
    relation: str | None  # "left of" | "above"
    background: str
    held_out: bool


def scenes(name: str, *, seed: int, split: str, index: int) -> tuple[Scene, ...]:
    """Return the scene at `index` and its twins, which training keeps in one batch.

    A twin differs in one respect that is hard for CLIP, so its caption is a hard negative. A pair
    has a twin with the two objects exchanged. In training, a recolored object or a pair also has a
    twin with another concept in the same place and color, and a recolored pair has one with the
    colors exchanged. No twin in training is a held-out composition.
    """
    generator = random.Random(f"{seed}/{name}/{split}/{index}")
    held_out = split == "test_held_out"
    weights = TRAIN_KIND_WEIGHTS if split == "train" else KIND_WEIGHTS[name]
    kinds = [kind for kind in weights if not (held_out and kind == "single")]
    kind = generator.choices(kinds, [weights[kind] for kind in kinds])[0]
    items, relation = _SAMPLERS[kind](name, held_out, generator)
    taken = {item.color or item.concept.color for item in items}
    background = generator.choice([color for color in BACKGROUNDS if color not in taken])
    scene = Scene(f"{index:08d}", index, kind, items, relation, background, held_out)
    twins = [] if relation is None else [_swapped(scene)]
    if split == "train" and kind not in ("single", "count"):
        twins.append(_another(scene, name, generator))
    if split == "train" and kind == "coloured_pair":
        twins.append(_colors_exchanged(scene))
    twins = [twin for twin in twins if held_out or not is_held_out(twin)]
    return (scene, *sorted(twins, key=lambda twin: twin.key))


def is_held_out(scene: Scene) -> bool:
    """Return whether the objects of a scene form a held-out composition."""
    concepts_ = [item.concept for item in scene.items]
    if any(is_cell_held_out(item.concept, item.color) for item in scene.items):
        return True
    if scene.relation is not None:
        return is_pair_held_out(*concepts_)
    return is_count_held_out(concepts_[0], len(concepts_))


def _swapped(scene: Scene) -> Scene:
    """Exchange the places of the two objects."""
    first, second = scene.items
    swapped = (second._replace(x=first.x, y=first.y), first._replace(x=second.x, y=second.y))
    return scene._replace(key=f"{scene.key}-swap", items=swapped)


def _colors_exchanged(scene: Scene) -> Scene:
    """Exchange the colors of the two objects."""
    first, second = scene.items
    exchanged = (first._replace(color=second.color), second._replace(color=first.color))
    return scene._replace(key=f"{scene.key}-colours", items=exchanged)


def _another(scene: Scene, name: str, generator: random.Random) -> Scene:
    """Replace one object by another concept in the same place and color."""
    place = generator.randrange(len(scene.items))
    present = {item.concept for item in scene.items}
    color = scene.items[place].color
    if color is None:
        others = [other for other in concepts(name) if other.color != scene.background]
    else:
        others = [other for other, painted in cells(name, held_out=False) if painted == color]
    twins = []
    for other in others:
        if other not in present:
            items = list(scene.items)
            items[place] = items[place]._replace(concept=other)
            twins.append(scene._replace(key=f"{scene.key}-other", items=tuple(items)))
    return generator.choice([twin for twin in twins if not is_held_out(twin)] or twins)


def _single(name: str, held_out: bool, generator: random.Random, *, colored: bool = False):
    if colored:
        concept, color = generator.choice(cells(name, held_out=held_out))
    else:
        concept, color = generator.choice(concepts(name)), None
    jitter, near, center = JITTER[name], partial(_near, generator), CANVAS / 2
    extent = SINGLE_EXTENT * generator.uniform(jitter.smallest, 1)
    room = min(jitter.shift, (CANVAS - extent) / 2 - 2)
    x, y = near(center, room), near(center, room)
    return (Item(concept, color, x, y, extent, near(0, jitter.rotation)),), None


def _pair(name: str, held_out: bool, generator: random.Random, *, colored: bool = False):
    known = [concept for concept in concepts(name) if concept.families or not colored]
    while True:
        pair = generator.sample(known, 2)
        colors = generator.sample(list(COLORS), 2) if colored else (None, None)
        unseen = is_pair_held_out(*pair) or any(map(is_cell_held_out, pair, colors))
        if unseen == held_out:
            break
    jitter, near = JITTER[name], partial(_near, generator)
    relation = generator.choice(list(PAIR_CENTERS))
    across, along = (jitter.shift, 1.5) if relation == "above" else (1.5, jitter.shift)
    items = []
    for concept, color, (x, y) in zip(pair, colors, PAIR_CENTERS[relation], strict=True):
        x, y = near(x, across), near(y, along)
        extent = PAIR_EXTENT * generator.uniform(jitter.smallest, 1)
        items.append(Item(concept, color, x, y, extent, near(0, jitter.rotation)))
    return tuple(items), relation


def _count(name: str, held_out: bool, generator: random.Random):
    while True:
        concept, count = generator.choice(concepts(name)), generator.choice(list(COUNT_CENTERS))
        if is_count_held_out(concept, count) == held_out:
            break
    jitter, near = JITTER[name], partial(_near, generator)
    extent, shift = COUNT_EXTENT * generator.uniform(jitter.smallest, 1), jitter.shift / 3
    return tuple(
        Item(concept, None, near(x, shift), near(y, shift), extent, near(0, jitter.rotation))
        for x, y in COUNT_CENTERS[count]
    ), None


_SAMPLERS = {
    "single": _single,
    "recoloured": partial(_single, colored=True),
    "pair": _pair,
    "count": _count,
    "coloured_pair": partial(_pair, colored=True),
}


def _near(generator: random.Random, center: float, reach: float) -> float:
    return center + generator.uniform(-reach, reach)
