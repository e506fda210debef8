"""Questions about emoji scenes for a judge CLIP: which of several captions is an image's?

The false captions of a scene of several objects are counterfactual: places, colors, one concept or
the count replaced. A CLIP that binds attributes to objects prefers the true caption to all of them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unclip.emoji.captions import NUMBERS, article
from unclip.emoji.catalog import COLORS, concepts
from unclip.files import read_json

_PAIR = re.compile(
    r"(?P<start>(?:a picture of |an emoji of )?)(?P<first>.+?)"
    r"(?P<relation> (?:to the )?(?:left|right) of | above | below )"
    r"(?P<second>.+?)(?P<end>(?: on an? \w+ background)?)"
)
_INVERSE = (" to the right of ", " below ")  # the caption names the second object first
_NUMBER = re.compile(rf"\b({'|'.join(NUMBERS.values())})\b")


class Probe(NamedTuple):
    """One kind of question, asked of the images that it applies to."""

    rows: list[int]  # index of each image
    # captions that each image's nearest is chosen from, the same number for each
    choices: list[list[str]]
    answers: list[int]  # index of the true caption among the choices

    def add(self, row: int, choices: list[str], answer: int = 0) -> None:
        """Ask the question of one more image."""
        self.rows.append(row)
        self.choices.append(choices)
        self.answers.append(answer)


def concept_set(root: str | Path) -> str | None:
    """Return the name of the concept set of a folder of emoji scenes, None for other data."""
    path = Path(root) / "dataset.json"
    if not path.is_file():
        return None
    return read_json(path).get("settings", {}).get("set")


def object_probes(metadata: Sequence[Mapping[str, Any]], name: str) -> dict[str, Probe]:
    """Return the questions about images of one object.

    `concept`: which concept of set `name` an object in its natural colors is ("an apple").
    `concept_recolored`: which concept a recolored object is, given its color ("a blue apple");
    without the color, a judge may rightly reject a blue apple. `color`: which color a recolored
    object has, given its concept. All held-out single objects are recolored.
    """
    known, colors = concepts(name), list(COLORS)
    index = {concept.hexcode: row for row, concept in enumerate(known)}
    probes = {kind: Probe([], [], []) for kind in ("concept", "concept_recolored", "color")}
    for row, scene in enumerate(metadata):
        if len(scene.get("objects", ())) != 1:
            continue
        (item,) = scene["objects"]
        color, answer = item["colour"], index[item["concept"]]
        if color is None:
            probes["concept"].add(row, [article(one.name) for one in known], answer)
            continue
        recolored = [article(f"{color} {one.name}") for one in known]
        probes["concept_recolored"].add(row, recolored, answer)
        painted = [article(f"{other} {item['name']}") for other in colors]
        probes["color"].add(row, painted, colors.index(color))
    return probes


def exchange_places(caption: str) -> str:
    """Exchange the two objects; the words stay the same."""
    parts = _parse(caption)
    return "".join((parts | {"first": parts["second"], "second": parts["first"]}).values())


def exchange_colors(caption: str, objects: Sequence[Mapping[str, Any]]) -> str:
    """Exchange the colors of two recolored objects."""
    parts = _parse(caption)
    first, second = (item["colour"] for item in _in_caption_order(parts, objects))
    swapped = {
        "first": article(f"{second} {_noun(parts['first'], first)}"),
        "second": article(f"{first} {_noun(parts['second'], second)}"),
    }
    return "".join((parts | swapped).values())


def replace_concept(caption: str, objects: Sequence[Mapping[str, Any]], row: int, name: str) -> str:
    """Replace the concept of object `row` by the one called `name`; its color stays."""
    parts, item = _parse(caption), objects[row]
    phrase = article(f"{item['colour']} {name}" if item["colour"] else name)
    place = "first" if _in_caption_order(parts, objects)[0] is item else "second"
    return "".join((parts | {place: phrase}).values())


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


def _parse(caption: str) -> dict[str, str]:
    """Split a caption of two objects into start, first, relation, second and end.

    The objects are noun phrases with articles.

    Raises:
        ValueError: the caption does not state a relation of two objects.
    """
    if (found := _PAIR.fullmatch(caption)) is None:
        raise ValueError(f"{caption!r} does not state a relation of two objects")
    return found.groupdict()


def _in_caption_order(parts: Mapping[str, str], objects: Sequence[Mapping[str, Any]]) -> Sequence:
    """Return the two objects in the order in which the caption names them."""
    return objects[::-1] if parts["relation"] in _INVERSE else objects


def _noun(phrase: str, color: str) -> str:
    """Return a noun phrase without its article and color."""
    return phrase.split(" ", 1)[1].removeprefix(f"{color} ")
