"""GenEval's prompts and rules (Ghosh et al. 2023): what a picture must show, and whether it does.

A prompt file is GenEval's evaluation_metadata.jsonl, a JSON object a line: "tag", "prompt",
"include" and "exclude", lists of {"class", "count", "color", "position": [relation, place in
include]}. Knows neither pictures nor detectors; an object is anything with a name, a box and a
color.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
POSITION_TOLERANCE = 0.1  # of both objects' sides, taken off their offset


class Found(Protocol):
    """An object in a picture; those of one picture come the surest first."""

    name: str
    box: tuple[float, float, float, float]  # left, upper, right and lower side, in [0, 1]
    color: str


class Wanted(NamedTuple):
    """Objects that a picture must show.

    Attributes:
        name: of their class.
        count: at least so many.
        color: of each of them; None is any.
        position: how each of them lies to those of another entry, given by its place.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


class Composition(NamedTuple):
    """A prompt and what its picture must show.

    Attributes:
        tag: the task.
        prompt: the words.
        include: what must be there.
        exclude: what must be there less often than its count.
        about: the whole line, with what it says beside GenEval's fields.
    """

    tag: str
    prompt: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()
    about: Mapping[str, Any] = {}

    @property
    def names(self) -> set[str]:
        """All classes that it speaks of."""
        return {wanted.name for wanted in (*self.include, *self.exclude)}


def parse(line: Mapping[str, Any]) -> Composition:
    """A line of a prompt file.

    Raises:
        ValueError: it is something else, a relation is unknown, or is to something that stands at
            no earlier place.
    """
    try:
        include = tuple(_wanted(entry) for entry in line["include"])
        exclude = tuple(_wanted(entry) for entry in line.get("exclude", ()))
        tag, prompt = str(line["tag"]), str(line["prompt"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{json.dumps(line)} is not GenEval's: {error!r}") from error
    for place, wanted in enumerate(include):
        if wanted.position is None:
            continue
        relation, target = wanted.position
        if relation not in RELATIONS or not 0 <= target < place:
            raise ValueError(f"no position {wanted.position} at place {place}")
    return Composition(tag, prompt, include, exclude, dict(line))


def write_compositions(file: Path, compositions: Iterable[Composition]) -> Path:
    """Writes prompts, and what is known beside GenEval's fields, in GenEval's format."""
    lines = (json.dumps(plain(composition), ensure_ascii=False) for composition in compositions)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.part")
    unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return unfinished.replace(file)


def plain(composition: Composition) -> dict[str, Any]:
    """A prompt as a line of its file."""
    line: dict[str, Any] = {"tag": composition.tag}
    line["include"] = [_plain(wanted) for wanted in composition.include]
    if composition.exclude:
        line["exclude"] = [_plain(wanted) for wanted in composition.exclude]
    return (
        line
        | {"prompt": composition.prompt}
        | {name: value for name, value in composition.about.items() if name not in line}
    )


def fault(composition: Composition, objects: Sequence[Found]) -> str | None:
    """Why a picture with these objects is wrong; None where it is right.

    Colour and position are asked of the surest objects alone, as many as are wanted.
    """
    matched: list[list[Found] | None] = []
    first_fault = None
    for wanted in composition.include:
        group = [one for one in objects if one.name == wanted.name][: wanted.count]
        wrong = _include_fault(wanted, group, matched)
        matched.append(group if wrong is None else None)
        first_fault = first_fault or wrong
    for unwanted in composition.exclude:
        count = sum(one.name == unwanted.name for one in objects)
        if count >= unwanted.count:
            first_fault = first_fault or f"{count} {unwanted.name}: too many"
    return first_fault


def relations(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> set[str]:
    """How the first box lies to the second.

    The offset of their centres loses a tenth of both sides on each axis; what is left, over the
    whole offset's length, must pass one half.
    """
    offset, left = [], []
    for axis in (0, 1):
        away = (first[axis] + first[axis + 2] - second[axis] - second[axis + 2]) / 2
        sides = first[axis + 2] - first[axis] + second[axis + 2] - second[axis]
        offset.append(away)
        left.append(math.copysign(max(abs(away) - POSITION_TOLERANCE * sides, 0), away))
    length = math.hypot(*offset)
    if length == 0:
        return set()
    across, along = (value / length for value in left)
    said = {"left of": -across, "right of": across, "above": -along, "below": along}
    return {relation for relation, cosine in said.items() if cosine > 0.5}


def _include_fault(
    wanted: Wanted, group: Sequence[Found], matched: Sequence[Sequence[Found] | None]
) -> str | None:
    if len(group) < wanted.count:
        return f"{len(group)} of {wanted.count} {wanted.name}"
    if wanted.color is not None and any(one.color != wanted.color for one in group):
        colors = " and ".join(one.color for one in group)
        return f"{wanted.name} is {colors}, not {wanted.color}"
    if wanted.position is None:
        return None
    relation, place = wanted.position
    targets = matched[place]
    if targets is None:
        return f"nothing for the {wanted.name} to be {relation}"
    for one in group:
        for target in targets:
            if relation not in (said := relations(one.box, target.box)):
                where = " and ".join(sorted(said)) or "at no side of"
                return f"{wanted.name} is {where} {target.name}, not {relation}"
    return None


def _wanted(entry: Mapping[str, Any]) -> Wanted:
    position = entry.get("position")
    if position is not None:
        relation, place = position
        position = (str(relation), int(place))
    return Wanted(str(entry["class"]), int(entry["count"]), entry.get("color"), position)


def _plain(wanted: Wanted) -> dict[str, Any]:
    entry: dict[str, Any] = {"class": wanted.name, "count": wanted.count}
    if wanted.color is not None:
        entry["color"] = wanted.color
    if wanted.position is not None:
        entry["position"] = list(wanted.position)
    return entry
