"""Counterfactual captions: places, colors, one concept or the count of a scene replaced.

A CLIP that binds attributes to objects prefers the true caption of an image to all of them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from unclip.emoji.captions import NUMBERS, article
from unclip.emoji.catalog import concepts
from unclip.emoji.probes import Probe

_PAIR = re.compile(
    r"(?P<start>(?:a picture of |an emoji of )?)(?P<first>.+?)"
    r"(?P<relation> (?:to the )?(?:left|right) of | above | below )"
    r"(?P<second>.+?)(?P<end>(?: on an? \w+ background)?)"
)
_INVERSE = (" to the right of ", " below ")  # the caption names the second object first
_NUMBER = re.compile(rf"\b({'|'.join(NUMBERS.values())})\b")


class PairCaption(NamedTuple):
    """The parts of a caption of two objects; the objects are noun phrases with articles."""

    start: str
    first: str
    relation: str
    second: str
    end: str

    @classmethod
    def parse(cls, caption: str) -> Self:
        """Split a caption of `unclip.emoji` into its parts.

        Raises:
            ValueError: the caption does not state a relation of two objects.
        """
        if (found := _PAIR.fullmatch(caption)) is None:
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
    first, second = (item["colour"] for item in _in_caption_order(parts, objects))
    swapped = {
        "first": article(f"{second} {_noun(parts.first, first)}"),
        "second": article(f"{first} {_noun(parts.second, second)}"),
    }
    return str(parts._replace(**swapped))


def replace_concept(caption: str, objects: Sequence[Mapping[str, Any]], row: int, name: str) -> str:
    """Replace the concept of object `row` by the one called `name`; its color stays."""
    parts = PairCaption.parse(caption)
    item = objects[row]
    color = item["colour"]
    phrase = article(f"{color} {name}" if color else name)
    place = "first" if _in_caption_order(parts, objects)[0] is item else "second"
    return str(parts._replace(**{place: phrase}))


def replace_count(caption: str) -> list[str]:
    """Return the caption with each other number of objects.

    Raises:
        ValueError: the caption does not state a number of objects.
    """
    if (found := _NUMBER.search(caption)) is None:
        raise ValueError(f"{caption!r} does not state a number of objects")
    others = [number for number in NUMBERS.values() if number != found[0]]
    return [f"{caption[: found.start()]}{other}{caption[found.end() :]}" for other in others]


def counterfactual_probes(
    captions: Sequence[str], metadata: Sequence[Mapping[str, Any]], name: str
) -> dict[str, Probe]:
    """Return the questions about images of several objects; the true caption comes first.

    `pair_places`: the two objects exchanged, for every pair. `pair_colors`: the colors exchanged,
    and `pair_concept`: one concept replaced by each other one of set `name` (asked of both
    objects), for recolored pairs. `count`: another number of objects, for counted scenes.
    """
    kinds = ("pair_places", "pair_colors", "pair_concept", "count")
    probes = {kind: Probe([], [], []) for kind in kinds}
    for row, (caption, scene) in enumerate(zip(captions, metadata, strict=True)):
        objects = scene.get("objects", ())
        if not scene.get("relation"):
            if len(objects) > 1:
                probes["count"].add(row, [caption, *replace_count(caption)])
            continue
        probes["pair_places"].add(row, [caption, exchange_places(caption)])
        if not all(item["colour"] for item in objects):
            continue
        probes["pair_colors"].add(row, [caption, exchange_colors(caption, objects)])
        for k, item in enumerate(objects):
            others = [one.name for one in concepts(name) if one.hexcode != item["concept"]]
            replaced = [replace_concept(caption, objects, k, other) for other in others]
            probes["pair_concept"].add(row, [caption, *replaced])
    return probes


def _in_caption_order(parts: PairCaption, objects: Sequence[Mapping[str, Any]]) -> Sequence:
    """Return the two objects in the order in which the caption names them."""
    return objects[::-1] if parts.relation in _INVERSE else objects


def _noun(phrase: str, color: str) -> str:
    """Return a noun phrase without its article and color."""
    return phrase.split(" ", 1)[1].removeprefix(f"{color} ")
