"""Held-out compositions, which training never sees: chosen by a hash of the composition.

About 15% of the (concept, color) cells, about 15% of the concept pairs (in both orders, because
every pair has a twin with its objects swapped) and the count four of three concepts are held out.
The hash depends neither on the seed nor on the set, so S, M and L agree. The numbers in its keys
were chosen so that the few cells and pairs of set S are spread over all concepts and colors.
"""

import hashlib
from functools import cache

from unclip.emoji.catalog import COLORS, Concept, concepts

HELD_OUT_PERCENT = 15
HELD_OUT_COUNT = 4
CONCEPTS_WITHOUT_COUNT = 3


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
    return count == HELD_OUT_COUNT and concept in concepts_without_count()


@cache
def concepts_without_count() -> tuple[Concept, ...]:
    """Return the three concepts of set S (so of every set) whose count four is held out."""
    ranked = sorted(concepts("S"), key=lambda concept: _digest("count2", concept.hexcode))
    return tuple(ranked[:CONCEPTS_WITHOUT_COUNT])


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
