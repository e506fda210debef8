"""Scenes as plain data: which objects, where, how large. Knows neither pixels nor words.

A scene is a function of (set, seed, split, index) alone, so any process can make any scene.
Lengths are in units of a 72 × 72 canvas, as OpenMoji's drawings are.
"""

import random
from typing import NamedTuple

from unclip.emoji.catalogue import BACKGROUNDS, COLORS, Concept, concepts
from unclip.emoji.compositions import (
    cells,
    is_cell_held_out,
    is_count_held_out,
    is_pair_held_out,
)

CANVAS = 72.0
SPLITS = ("train", "val", "test_seen", "test_held_out")
SINGLE_EXTENT, PAIR_EXTENT, COUNT_EXTENT = 58.0, 31.0, 28.0  # the longer side at scale 1

# Relative frequency of each kind of scene, before twins are added.
KIND_WEIGHTS = {
    "S": {"single": 38, "recoloured": 42, "pair": 7, "count": 6, "coloured_pair": 7},
    "M": {"single": 40, "recoloured": 20, "pair": 10, "count": 10, "coloured_pair": 5},
    "L": {"single": 40, "recoloured": 20, "pair": 10, "count": 10, "coloured_pair": 5},
}
# In training, with the twins, more than half of the images show two recolored objects: neither
# CLIP nor the decoder learns to bind colors and concepts to places from fewer.
TRAIN_KIND_WEIGHTS = {"single": 26, "recoloured": 28, "pair": 8, "count": 6, "coloured_pair": 32}


class Jitter(NamedTuple):
    """How much two scenes of the same content differ: set S's only a little."""

    smallest: float  # scale; the largest is 1
    shift: float  # of a single object's centre, either way
    rotation: float  # degrees, either way


JITTER = {"S": Jitter(0.88, 3.0, 4.0), "M": Jitter(0.75, 6.0, 8.0), "L": Jitter(0.75, 6.0, 8.0)}
PAIR_CENTRES = {"left of": ((18.5, 36.0), (53.5, 36.0)), "above": ((36.0, 18.5), (36.0, 53.5))}
COUNT_CENTRES = {
    2: ((19.0, 36.0), (53.0, 36.0)),
    3: ((19.0, 20.0), (53.0, 20.0), (36.0, 52.0)),
    4: ((19.0, 19.0), (53.0, 19.0), (19.0, 53.0), (53.0, 53.0)),
}


class Item(NamedTuple):
    """One object in its place."""

    concept: Concept
    color: str | None  # None: as OpenMoji draws it
    x: float  # centre of its box
    y: float
    extent: float  # longer side of its box
    angle: float  # degrees, clockwise


class Scene(NamedTuple):
    """One picture to be."""

    key: str
    index: int
    kind: str
    items: tuple[Item, ...]  # a pair's first item is the left or the upper one
    relation: str | None  # "left of" | "above"
    background: str
    held_out: bool


def scenes(name: str, *, seed: int, split: str, index: int) -> tuple[Scene, ...]:
    """Return the scene at `index` and its twins, which training keeps in one batch.

    A twin differs in one thing that CLIP finds hard, so its caption is a hard negative. A pair has
    a twin with the two objects exchanged. In training, a recolored object or pair also has one with
    another concept in the same place and color, and a recolored pair one with the colors exchanged.
    No twin is a composition that training must not see.
    """
    draw = random.Random(f"{seed}/{name}/{split}/{index}")
    held_out = split == "test_held_out"
    weights = TRAIN_KIND_WEIGHTS if split == "train" else KIND_WEIGHTS[name]
    kinds = [kind for kind in weights if not (held_out and kind == "single")]
    kind = draw.choices(kinds, [weights[kind] for kind in kinds])[0]
    items, relation = _DRAW[kind](name, held_out, draw)
    taken = {item.color or item.concept.color for item in items}
    background = draw.choice([color for color in BACKGROUNDS if color not in taken])
    scene = Scene(f"{index:08d}", index, kind, items, relation, background, held_out)
    twins = [] if relation is None else [_swapped(scene)]
    if split == "train" and kind not in ("single", "count"):
        twins.append(_another(scene, name, draw))
    if split == "train" and kind == "coloured_pair":
        twins.append(_colors_exchanged(scene))
    twins = [twin for twin in twins if held_out or not is_held_out(twin)]
    return (scene, *sorted(twins, key=lambda twin: twin.key))


def is_held_out(scene: Scene) -> bool:
    """Whether `scene` holds a composition that training must not see; read off its objects."""
    concepts_ = [item.concept for item in scene.items]
    if any(is_cell_held_out(item.concept, item.color) for item in scene.items):
        return True
    if scene.relation is not None:
        return is_pair_held_out(*concepts_)
    return is_count_held_out(concepts_[0], len(concepts_))


def _swapped(scene: Scene) -> Scene:
    """The same scene with its two objects in each other's place."""
    first, second = scene.items
    swapped = (second._replace(x=first.x, y=first.y), first._replace(x=second.x, y=second.y))
    return scene._replace(key=f"{scene.key}-swap", items=swapped)


def _colors_exchanged(scene: Scene) -> Scene:
    """The same scene with its two objects in each other's color."""
    first, second = scene.items
    exchanged = (first._replace(color=second.color), second._replace(color=first.color))
    return scene._replace(key=f"{scene.key}-colours", items=exchanged)


def _another(scene: Scene, name: str, draw: random.Random) -> Scene:
    """The same scene with one object replaced by another concept in its place and color."""
    place = draw.randrange(len(scene.items))
    present = {item.concept for item in scene.items}
    color = scene.items[place].color
    if color is None:
        others = [other for other in concepts(name) if other.color != scene.background]
    else:
        others = [other for other, painted in cells(name, held_out=False) if painted == color]
    twins = [_replaced(scene, place, other) for other in others if other not in present]
    return draw.choice([twin for twin in twins if not is_held_out(twin)] or twins)


def _replaced(scene: Scene, place: int, concept: Concept) -> Scene:
    items = list(scene.items)
    items[place] = items[place]._replace(concept=concept)
    return scene._replace(key=f"{scene.key}-other", items=tuple(items))


def _single(name: str, held_out: bool, draw: random.Random):
    return (_place_single(draw.choice(concepts(name)), None, JITTER[name], draw),), None


def _recoloured(name: str, held_out: bool, draw: random.Random):
    concept, color = draw.choice(cells(name, held_out=held_out))
    return (_place_single(concept, color, JITTER[name], draw),), None


def _pair(name: str, held_out: bool, draw: random.Random):
    while True:
        first, second = draw.sample(concepts(name), 2)
        if is_pair_held_out(first, second) == held_out:
            return _place_pair((first, second), (None, None), JITTER[name], draw)


def _coloured_pair(name: str, held_out: bool, draw: random.Random):
    recolourable = [concept for concept in concepts(name) if concept.families]
    while True:
        pair = draw.sample(recolourable, 2)
        colors = draw.sample(list(COLORS), 2)
        unseen = is_pair_held_out(*pair) or any(map(is_cell_held_out, pair, colors))
        if unseen == held_out:
            return _place_pair(pair, colors, JITTER[name], draw)


def _count(name: str, held_out: bool, draw: random.Random):
    while True:
        concept, count = draw.choice(concepts(name)), draw.choice(list(COUNT_CENTRES))
        if is_count_held_out(concept, count) == held_out:
            break
    jitter = JITTER[name]
    scale, shift = draw.uniform(jitter.smallest, 1), jitter.shift / 3
    return tuple(
        Item(
            concept=concept,
            color=None,
            x=x + draw.uniform(-shift, shift),
            y=y + draw.uniform(-shift, shift),
            extent=COUNT_EXTENT * scale,
            angle=draw.uniform(-jitter.rotation, jitter.rotation),
        )
        for x, y in COUNT_CENTRES[count]
    ), None


_DRAW = {
    "single": _single,
    "recoloured": _recoloured,
    "pair": _pair,
    "count": _count,
    "coloured_pair": _coloured_pair,
}


def _place_single(concept: Concept, color: str | None, jitter: Jitter, draw: random.Random) -> Item:
    extent = SINGLE_EXTENT * draw.uniform(jitter.smallest, 1)
    room = min(jitter.shift, (CANVAS - extent) / 2 - 2)
    return Item(
        concept=concept,
        color=color,
        x=CANVAS / 2 + draw.uniform(-room, room),
        y=CANVAS / 2 + draw.uniform(-room, room),
        extent=extent,
        angle=draw.uniform(-jitter.rotation, jitter.rotation),
    )


def _place_pair(pair, colors, jitter: Jitter, draw: random.Random):
    relation = draw.choice(list(PAIR_CENTRES))
    across, along = (jitter.shift, 1.5) if relation == "above" else (1.5, jitter.shift)
    return tuple(
        Item(
            concept=concept,
            color=color,
            x=x + draw.uniform(-across, across),
            y=y + draw.uniform(-along, along),
            extent=PAIR_EXTENT * draw.uniform(jitter.smallest, 1),
            angle=draw.uniform(-jitter.rotation, jitter.rotation),
        )
        for concept, color, (x, y) in zip(pair, colors, PAIR_CENTRES[relation], strict=True)
    ), relation
