"""The concepts, colors and backgrounds of scenes, and the compositions that training never sees.

concepts.tsv lists the concepts: OpenMoji's file, the smallest set with the concept, its names, the
color of the drawing, and the palette families that a new color replaces.

About 15% of the (concept, color) cells, about 15% of the concept pairs (in both orders, because
every pair has a twin with its objects swapped) and the count four of three concepts are held out,
by a hash of the composition. The hash depends neither on the seed nor on the set, so S, M and L
agree. The numbers in its keys were chosen so that the few cells and pairs of set S are spread over
all concepts and colors.
"""

import csv
import hashlib
from functools import cache
from importlib import resources
from typing import NamedTuple

from unclip.files import decode_text, split_lines

LICENSE = "CC BY-SA 4.0"  # of OpenMoji, and so of the images
LICENSE_URL = "https://creativecommons.org/licenses/by-sa/4.0/"


class Concept(NamedTuple):
    """One row of concepts.tsv."""

    number: int  # 1-based row of the table, the same in every set
    hexcode: str  # OpenMoji's file name without its suffix
    name: str
    plural: str
    alias: str  # another plain name, or ""
    color: str  # the color that a viewer would name, or ""
    families: tuple[str, ...]  # palette families that a new color replaces; () = never recolored
    group: str


class Shades(NamedTuple):
    """The shades of a color in OpenMoji's drawings."""

    body: str  # main shade of a recolored object
    detail: str  # its other shade
    palette: tuple[str, ...]  # every shade of the family in the drawings


COLORS = {
    "red": Shades("#ea5a47", "#d22f27", ("#ea5a47", "#d22f27", "#781e32")),
    "orange": Shades("#f4aa41", "#e27022", ("#f4aa41", "#e27022")),
    "yellow": Shades("#fcea2b", "#f1b31c", ("#fcea2b", "#f1b31c")),
    "green": Shades("#5c9e31", "#b1cc33", ("#b1cc33", "#5c9e31", "#186648")),
    "blue": Shades("#61b2e4", "#1e50a0", ("#92d3f5", "#61b2e4", "#1e50a0")),
    "purple": Shades("#8967aa", "#b399c8", ("#b399c8", "#8967aa")),
    "pink": Shades("#ffa7c0", "#e67a94", ("#ffa7c0", "#e67a94")),
    "brown": Shades("#a57939", "#6a462f", ("#a57939", "#6a462f")),
}

# Pale and flat, so that the black outline and every body color stand out.
BACKGROUNDS = {
    "white": "#ffffff",
    "grey": "#bdbdbd",
    "blue": "#a4d3f7",
    "green": "#aee3a0",
    "yellow": "#fff09a",
    "pink": "#ffc2dc",
    "purple": "#d2bff3",
    "orange": "#ffc98f",
}

SETS = ("S", "M", "L")  # each contains the previous one
HELD_OUT_PERCENT = 15


@cache
def concepts(name: str) -> tuple[Concept, ...]:
    """Return the concepts of set `name` (S, M or L), in table order.

    Raises:
        ValueError: there is no such set.
    """
    if name not in SETS:
        raise ValueError(f"unknown concept set {name!r}: choose one of {', '.join(SETS)}")
    included = SETS[: SETS.index(name) + 1]
    return tuple(concept for own_set, concept in _table() if own_set in included)


@cache
def _table() -> tuple[tuple[str, Concept], ...]:
    file = resources.files("unclip.emoji").joinpath("concepts.tsv")
    lines = split_lines(decode_text(file.read_bytes(), file))
    table = []
    for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), start=1):
        own_set, families = row.pop("set"), filter(None, row.pop("families").split(","))
        table.append((own_set, Concept(number=number, families=tuple(families), **row)))
    return tuple(table)


def is_cell_held_out(concept: Concept, color: str | None) -> bool:
    """Return whether `concept` in `color` is held out; its own color (or None) never is."""
    if color is None or color == concept.families[0]:
        return False
    return _percent("cell1708", concept.hexcode, color) < HELD_OUT_PERCENT


def is_pair_held_out(first: Concept, second: Concept) -> bool:
    """Return whether scenes of `first` and `second`, in either order, are held out."""
    return _percent("pair1320", *sorted((first.hexcode, second.hexcode))) < HELD_OUT_PERCENT


def is_count_held_out(concept: Concept, count: int) -> bool:
    """Return whether scenes of `count` objects of `concept` are held out."""
    return count == 4 and concept in concepts_without_count()


@cache
def concepts_without_count() -> tuple[Concept, ...]:
    """Return the three concepts of set S (so of every set) whose count four is held out."""
    ranked = sorted(concepts("S"), key=lambda concept: _digest("count2", concept.hexcode))
    return tuple(ranked[:3])


@cache
def cells(name: str, *, held_out: bool) -> tuple[tuple[Concept, str], ...]:
    """Return the (concept, color) cells of set `name` that are, or are not, held out."""
    return tuple(
        (concept, color)
        for concept in concepts(name)
        if concept.families
        for color in COLORS
        if is_cell_held_out(concept, color) == held_out
    )


def _percent(*parts: str) -> int:
    return int(_digest(*parts)[:12], 16) % 100


def _digest(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()
