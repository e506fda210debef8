"""Counterfactual captions of two-object scenes: places, colors or one concept replaced.

A CLIP that binds prefers the true caption of an image to all of them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from unclip.emoji import concepts
from unclip.emoji.captions import article
from unclip.evaluation.measures import Probe

_CAPTION = re.compile(
    r"(?P<start>(?:a picture of |an emoji of )?)(?P<first>.+?)"
    r"(?P<relation> (?:to the )?(?:left|right) of | above | below )"
    r"(?P<second>.+?)(?P<end>(?: on an? \w+ background)?)"
)
_INVERSE = (" to the right of ", " below ")  # the caption names the second object first


class PairCaption(NamedTuple):
    """A caption of two objects in its parts; the two objects are noun phrases with articles."""

    start: str
    first: str
    relation: str
    second: str
    end: str

    @classmethod
    def parse(cls, caption: str) -> Self:
        """Split a caption of `unclip.emoji`.

        Raises:
            ValueError: it does not state a relation of two objects.
        """
        if (found := _CAPTION.fullmatch(caption)) is None:
            raise ValueError(f"{caption!r} does not state a relation of two objects")
        return cls(**found.groupdict())

    def __str__(self) -> str:
        return "".join(self)


def exchange_places(caption: str) -> str:
    """Exchange the two objects; the words stay the same."""
    parts = PairCaption.parse(caption)
    return str(parts._replace(first=parts.second, second=parts.first))


def exchange_colors(caption: str, objects: Sequence[Mapping[str, Any]]) -> str:
    """Exchange the colors of two recolored objects."""
    parts = PairCaption.parse(caption)
    first, second = _as_named(parts, objects)
    return str(
        parts._replace(
            first=article(f"{second['colour']} {_noun(parts.first, first)}"),
            second=article(f"{first['colour']} {_noun(parts.second, second)}"),
        )
    )


def replace_concept(caption: str, objects: Sequence[Mapping[str, Any]], row: int, name: str) -> str:
    """Replace the concept of object `row` by the one called `name`; its color stays."""
    parts = PairCaption.parse(caption)
    item = objects[row]
    phrase = article(f"{item['colour']} {name}" if item["colour"] else name)
    place = "first" if _as_named(parts, objects)[0] is item else "second"
    return str(parts._replace(**{place: phrase}))


def pair_probes(
    captions: Sequence[str], metadata: Sequence[Mapping[str, Any]], name: str
) -> dict[str, Probe]:
    """Return the probes of two-object images, in each of which the true caption comes first.

    `pair_places`: the objects exchanged, for every pair. `pair_colors`: the colors exchanged, and
    `pair_concept`: one concept replaced by each other one of set `name` (asked of both objects),
    for recolored pairs.
    """
    asked = {kind: Probe([], [], []) for kind in ("pair_places", "pair_colors", "pair_concept")}
    for row, (caption, scene) in enumerate(zip(captions, metadata, strict=True)):
        if not scene.get("relation"):
            continue
        objects = scene["objects"]
        asked["pair_places"].add(row, [caption, exchange_places(caption)], 0)
        if not all(item["colour"] for item in objects):
            continue
        asked["pair_colors"].add(row, [caption, exchange_colors(caption, objects)], 0)
        for k, item in enumerate(objects):
            others = [one.name for one in concepts(name) if one.hexcode != item["concept"]]
            replaced = [replace_concept(caption, objects, k, other) for other in others]
            asked["pair_concept"].add(row, [caption, *replaced], 0)
    return asked


def _as_named(parts: PairCaption, objects: Sequence[Mapping[str, Any]]) -> Sequence[Mapping]:
    """Return the two objects in the caption's order."""
    return objects[::-1] if parts.relation in _INVERSE else objects


def _noun(phrase: str, item: Mapping[str, Any]) -> str:
    """Return a noun phrase without its article and color."""
    return phrase.split(" ", 1)[1].removeprefix(f"{item['colour']} ")
